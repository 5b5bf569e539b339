"""Keep adapters working when the base changes: upgrades to a new base, extraction and continual learning."""
