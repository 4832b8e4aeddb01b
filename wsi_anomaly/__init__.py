"""Find what is not normal in whole-slide images, without a single annotation."""

__version__ = "0.1.0"
