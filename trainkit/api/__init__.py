"""The Python API behind ``import trainkit``; each part is loaded on first use."""
