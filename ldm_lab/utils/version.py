"""Versions of package and files, in a module of their own that is cheap to import."""

__version__ = "0.1.0"

# Format number in training checkpoints, config.yaml and status.json. Raise it if an older version would misread the
# files of this version. Files without a number have format 1.
FORMAT = 2
FORMAT_KEY = "ldm_lab_format"
