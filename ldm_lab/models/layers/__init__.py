"""Blocks that networks are built from: torch only, parameters named as in diffusers."""
