"""Checks the health of a training: pure functions from its records to findings."""
