"""What the experiments share: training, optimizers, reports; it imports no task."""
