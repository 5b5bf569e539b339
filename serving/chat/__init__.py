"""Chats: how messages become a prompt, and how the answer's text becomes content, reasoning and tool calls."""
