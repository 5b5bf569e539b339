"""The arena that KV cache and adapters share: its pages, cached prefixes, eviction and swapping."""
