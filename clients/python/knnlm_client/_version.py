"""The client's version, on its own so that modules can read it without importing the package's front."""

__version__ = "0.1.0"
