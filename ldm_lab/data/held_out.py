"""Chooses the images that training never sees, by a hash of their names."""

from __future__ import annotations

from hashlib import blake2b

import numpy as np


def is_held_out(names: np.ndarray, val_fraction: float) -> np.ndarray:
    """Which of `names` (two or more, bytes) to hold out, by hash: `(N,)`, bool, neither all nor none."""
    hashes = (blake2b(name, digest_size=6).digest() for name in names.tolist())
    draws = np.array([int.from_bytes(value, "little") / 2**48 for value in hashes])  # in [0, 1), a function of the name
    chosen = draws < val_fraction
    chosen[draws.argmax()], chosen[draws.argmin()] = False, True
    return chosen
