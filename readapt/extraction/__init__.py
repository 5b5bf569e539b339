"""A full checkpoint becomes an adapter: what each tensor is, how it is cut, where it is written, what is reported."""
