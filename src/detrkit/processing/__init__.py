"""Images in, targets in, detections out: everything around the network."""
