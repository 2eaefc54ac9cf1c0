"""Weights become text: candidate trees, acceptance rules and the runtime that plain decoding shares."""
