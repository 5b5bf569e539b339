"""The HTTP interface: OpenAI routes, request bodies, replies, and Prometheus metrics."""
