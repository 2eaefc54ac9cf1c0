"""Faster code for a decoding step."""
