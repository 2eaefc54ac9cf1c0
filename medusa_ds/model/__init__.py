"""Tokens become loss sums: backbone, heads, rows and loss."""
