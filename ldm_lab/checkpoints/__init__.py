"""Locates models and reads their configs and tensors from checkpoints and folders of every kind."""
