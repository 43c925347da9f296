"""Image datasets, the order of training images, and the Lightning data module.

This file imports nothing, so that the drawing processes of the demo (`drawing.py`) start without torch.
"""
