"""The training room: TrainingArguments, the Trainer, and what it shows."""
