"""From a model name to an engine: routes, canaries, prompts, adapters that clients load, and the readiness check."""
