"""Heads in the layouts of other programs."""
