"""What the experiments on sleeping coordinates share: their optimizers and runs."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from experiments.lazy_bounds import VARIANTS, lazy_adamod
from experiments.training import Run
from experiments.waking import record_updates
from optax_adamod import adamod


def optimizers(
    learning_rate: float, warmup: int, b2: float, b3: float
) -> dict[str, optax.GradientTransformation]:
    schedule = optax.linear_schedule(learning_rate / warmup, learning_rate, warmup)
    return {
        "Adam": optax.adam(learning_rate, b2=b2),
        f"Adam, {warmup} steps of warm-up": optax.adam(schedule, b2=b2),
        "AdaMod": adamod(learning_rate, b2=b2, b3=b3),
        **{
            f"AdaMod, {name}": lazy_adamod(learning_rate, name, b2=b2, b3=b3)
            for name in VARIANTS
        },
    }


def runs_of(options: Any, select: Callable[[Any], jax.Array], awake: int) -> list[Run]:
    """Returns every run of an experiment on sleeping coordinates.

    Args:
      options: The experiment's options.
      select: The part of the parameters whose updates are recorded.
      awake: The most coordinates of it that are awake in a step.
    """
    return [
        Run(
            name,
            record_updates(tx, rate, select, awake),
            rate,
            seed,
            options.b3 if name.startswith("AdaMod") else None,
        )
        for rate in options.rates
        for name, tx in optimizers(rate, options.warmup, options.b2, options.b3).items()
        for seed in range(options.seeds)
    ]
