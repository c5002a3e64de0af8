"""DETR: End-to-End Object Detection with Transformers (Carion et al., 2020)."""
