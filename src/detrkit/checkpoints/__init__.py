"""The released checkpoints, and loading of models by name or folder."""
