"""The re-adaptation benchmark: how soon and how good adapters are on a new base."""
