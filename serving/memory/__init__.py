"""The paged memory that KV cache and adapters share: pages, cached prefixes, eviction and swap."""
