"""One callback a file; all are counted in images."""
