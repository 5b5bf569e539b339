"""Carry a whole fleet over to a new base: the order of the adapters, the workers, and the records of it."""
