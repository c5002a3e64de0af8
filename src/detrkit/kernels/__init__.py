"""Numerical kernels behind the layers, for one kind of device each."""
