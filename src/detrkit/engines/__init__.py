"""Ways to run a model: the same call, different machinery."""
