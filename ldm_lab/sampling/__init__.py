"""Samples by their index: seed, noise, image, file; and pictures beside them."""
