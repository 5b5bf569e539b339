"""Extraction of LoRA adapters from fully fine-tuned checkpoints."""
