"""Sampling: seeds, samples to PNG files, and pictures that explain a model."""
