"""Low-rank algebra: truncated SVD, rank rules, and the difference of two checkpoints."""
