"""The version of the package: this line is the only place it is written (pyproject.toml reads it from here)."""

__version__ = "0.1.0"
