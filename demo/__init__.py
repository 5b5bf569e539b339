"""A small world made from nothing, and the main job run on it: what `relora demo` shows."""
