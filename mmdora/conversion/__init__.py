"""Checkpoints of other code as Hugging Face models."""
