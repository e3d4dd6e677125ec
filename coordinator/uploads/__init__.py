"""Uploads of outputs: what is refused, what is accepted, and how often."""
