"""Carry one adapter over to a new base: the ladder, its rungs and its gate."""
