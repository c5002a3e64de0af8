"""Command-line program; one file a command."""
