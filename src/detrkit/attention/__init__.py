"""What a model attends to, and drawings of it."""
