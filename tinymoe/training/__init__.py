"""Training: data, synthetic text, optimizer, evaluation, trainer, run folder."""
