"""The synthetic dataset: drawn birds."""
