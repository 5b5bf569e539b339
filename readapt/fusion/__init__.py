"""The fused start: old adapter plus base evolution, with coefficients found by search."""
