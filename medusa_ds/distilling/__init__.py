"""A model's own answers become training data."""
