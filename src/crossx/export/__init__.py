"""Export trained networks for other programs, verified against the original."""
