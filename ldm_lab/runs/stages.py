"""The stages of a run."""

from __future__ import annotations

STAGES = AUTOENCODER, DIFFUSION = ("autoencoder", "diffusion")  # in order
