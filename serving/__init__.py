"""One request's way to its tokens: an engine for many adapters, and its HTTP interface."""
