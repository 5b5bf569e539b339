"""The fleet file: its settings, their checks, and its reference."""
