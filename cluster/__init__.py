"""What all packages share: settings, adapter and checkpoint files, the blob store, the registry, rollouts and Ray."""
