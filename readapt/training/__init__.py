"""Rows, LoRA on a Hugging Face model, fine-tuning of many adapters at once, and evaluation."""
