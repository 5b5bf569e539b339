"""What exists and which version is live: names, files, blobs, configuration, the registry and the rollout rule."""
