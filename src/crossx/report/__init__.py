"""What evaluation found, for people to read: tables, charts, the published numbers, a page about a run. No network."""
