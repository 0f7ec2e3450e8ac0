"""What programs share: models, text, the loop, figures, checkpoints; no program."""
