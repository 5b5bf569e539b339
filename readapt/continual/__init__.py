"""Continual learning: an adapter learns new classes stage by stage without forgetting the earlier ones."""
