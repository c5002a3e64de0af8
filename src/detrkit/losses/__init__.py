"""Boxes, bipartite matching and the set criterion."""
