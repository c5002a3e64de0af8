"""Conditional DETR for Fast Training Convergence (Meng et al., 2021)."""
