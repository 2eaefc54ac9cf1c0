"""Conversations become rows of tokens."""
