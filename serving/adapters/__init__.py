"""Keeps adapters on disk, host and device, and lays their weights out in pages."""
