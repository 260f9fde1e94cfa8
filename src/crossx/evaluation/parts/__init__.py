"""What the parts of a network look at, compared with the known parts of objects."""
