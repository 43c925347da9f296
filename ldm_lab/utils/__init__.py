"""Utilities for all other packages; this package imports none of them."""
