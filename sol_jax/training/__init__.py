"""Training: the loop around the update, with its logs, evaluations and checkpoints."""
