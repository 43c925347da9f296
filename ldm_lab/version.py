"""The version, apart from the package so that importing it costs nothing."""

__version__ = "0.1.0"
