"""Turns a command line into built objects; the only package that imports Hydra and OmegaConf."""
