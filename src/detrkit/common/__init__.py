"""What every other package may use: errors, files, limits, progress, untrusted files, boxes."""
