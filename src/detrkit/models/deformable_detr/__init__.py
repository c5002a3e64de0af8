"""Deformable DETR: Deformable Transformers for End-to-End Object Detection (Zhu et al., 2021)."""
