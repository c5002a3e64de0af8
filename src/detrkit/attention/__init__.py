"""What a model looks at, and pictures of it."""
