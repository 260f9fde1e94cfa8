"""Ablations: suites of variants of one configuration, trained with several seeds, and their table."""
