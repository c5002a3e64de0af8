"""A family that only tests know: DETR with a norm after the encoder and a sigmoid for each class."""
