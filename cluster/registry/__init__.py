"""What exists and which version is live: the database and what changes it."""
