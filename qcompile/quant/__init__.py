"""Schemes and the only arithmetic that rounds."""
