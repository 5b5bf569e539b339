"""The HTTP interface: OpenAI's routes, request bodies and replies, and Prometheus metrics."""
