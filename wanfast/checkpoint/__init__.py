"""Model files: open any layout, read tensors by their official names, refuse what is wrong by name."""
