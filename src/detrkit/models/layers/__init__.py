"""Layers that the three families share."""
