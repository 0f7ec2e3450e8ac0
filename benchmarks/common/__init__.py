"""What the programs share: optimizers, shapes, targets, clocks and tables."""
