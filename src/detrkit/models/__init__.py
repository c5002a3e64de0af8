"""Network definitions, one folder a family, on shared layers."""
