"""Where adapters are: store, disk, host or device; and how their weights are laid out in pages."""
