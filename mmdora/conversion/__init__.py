"""Convert checkpoints of other code to Hugging Face models."""
