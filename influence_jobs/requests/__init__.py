"""From what a user asks, on the command line or in Python, to specs."""
