"""Audit a dataset: duplicates, leakage, label errors, outliers, image quality and class balance."""
