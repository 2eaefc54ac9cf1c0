"""Kinds of heads, and how heads lie on disk."""
