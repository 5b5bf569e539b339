"""The revisions, in order: each has its number, that of its predecessor, and `upgrade`."""
