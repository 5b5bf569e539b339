"""A whole fleet on its way to a new base: who works on which adapter, in which order, and what the registry hears."""
