"""Medusa heads trained with DeepSpeed ZeRO and Liger's fused linear cross-entropy, from one YAML recipe."""

__version__ = "0.1.0"
