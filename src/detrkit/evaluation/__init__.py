"""How good a model is: COCO average precision, panoptic quality, and where its mistakes lie."""
