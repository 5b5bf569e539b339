"""Benchmarks. Each writes JSON and prints a table."""
