"""A trained network with its model card as a folder, and on the Hugging Face Hub."""
