"""Labelled images: where they come from, how they are dealt out to devices, and how they are varied."""
