"""Adapter folders: which files count, what they mean, and on which base they were trained."""
