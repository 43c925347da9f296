"""Images as tensors: the datasets, the order in which training sees them, and the Lightning data module.

Nothing is imported here, so that the drawing processes of the demo (`drawing.py`) start without torch.
"""
