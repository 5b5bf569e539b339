"""Turns model names into versions and engines; loads clients' adapters; checks that new versions are ready."""
