"""Data sets with boxes and masks: reading, checking, augmentation and batching."""
