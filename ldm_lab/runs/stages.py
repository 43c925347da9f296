"""The stages of a run."""

from __future__ import annotations

STAGES = ("autoencoder", "diffusion")  # in their order
