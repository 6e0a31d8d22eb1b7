"""Training: TrainingArguments, the Trainer, batches, checkpoints, metrics and reports."""
