"""Benchmarks of `python -m ldm_lab benchmark`, alone or against diffusers and torchvision."""
