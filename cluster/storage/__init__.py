"""Where files lie: blobs, checkpoints, sources by URL or hub id, and rows."""
