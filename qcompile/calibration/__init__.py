"""Samples, the streaming runner and observers."""
