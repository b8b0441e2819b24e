"""Requests: a user's options, from the command line or Python, become specs."""
