"""What every other package may use: errors, files, limits, text, progress, untrusted files, boxes."""
