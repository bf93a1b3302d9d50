"""Train a small text classifier, export it with proof, serve it without torch."""

__version__ = "0.1.0"
