"""The drawn birds of the synthetic dataset."""
