"""Tables, charts and published numbers: what evaluation found, for people to read."""
