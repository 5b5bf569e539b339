"""What `relora demo` shows: a small fleet, made from nothing, survives a base-model upgrade under load."""
