"""Made-up runs and their rows, shared by the tests."""

import optax

from experiments.common.training import Run


def run_of(name="Adam", rate=0.1, seed=0, b3=None, transformation=None):
    return Run(name, transformation or optax.identity(), rate, seed, b3)


def rows_of(*losses, every=10):
    return [
        {"step": every * (i + 1), "loss": x, "highest loss": x + 0.25, "seconds": i + 1}
        for i, x in enumerate(losses)
    ]
