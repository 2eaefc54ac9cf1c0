"""Loss sums become weights: engine, optimizer, checkpoints, the loop, and what it tells."""
