"""Language models as Hugging Face checkpoints."""
