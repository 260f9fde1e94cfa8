"""One reader per dataset: the official archives, and the user's own folders and tables."""
