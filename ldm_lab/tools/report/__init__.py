"""HTML report that compares runs."""
