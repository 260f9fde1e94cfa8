"""Fine-grained visual categorization: Cross-X learning and the methods it is compared with, on one contract."""
