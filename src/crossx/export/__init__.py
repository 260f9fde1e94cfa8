"""A trained network as one file for other programs, checked against the network that it was made of."""
