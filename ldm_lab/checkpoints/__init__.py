"""From a string to tensors and configs: which state a source names, and how files of every kind are read."""
