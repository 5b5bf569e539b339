"""Extraction measured: speed, loss, memory, and what it is worth when served."""
