"""Measures of quality that are reported, never trained on."""
