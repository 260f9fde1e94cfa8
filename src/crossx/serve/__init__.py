"""A trained network over HTTP: the service and its page."""
