"""Released checkpoints: their registry, tensor layouts, safe reading and conversion."""
