"""One trained network as a predictor: its inputs, its outputs, and collections of any size."""
