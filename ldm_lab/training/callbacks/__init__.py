"""Lightning callbacks, one per file; all intervals are in training images."""
