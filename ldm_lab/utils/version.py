"""The version, apart from the package so that importing it costs nothing."""

__version__ = "0.1.0"

# Of training checkpoints, config.yaml and status.json, each of which carries the number: raised where an older version
# would misread what this one writes. Files without it are of format 1.
FORMAT = 2
FORMAT_KEY = "ldm_lab_format"
