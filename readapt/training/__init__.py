"""Rows and their tokens, LoRA on a Hugging Face model, training of many adapters at once, and evaluation."""
