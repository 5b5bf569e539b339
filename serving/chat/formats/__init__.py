"""The formats in which models write tool calls, one file each, and the table that finds a chat template's format."""
