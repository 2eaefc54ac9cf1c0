"""What a user writes becomes a checked recipe and a DeepSpeed config."""
