"""Detectors at work: one call, many images, a cluster."""
