"""Command groups of `relora`: they parse arguments, call the packages and print; relora.py joins them."""
