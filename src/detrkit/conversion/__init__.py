"""From checkpoints of the original repositories to models of detrkit."""
