"""Trains the Post-LN Transformer with AdaMod's averages in float32 and in bfloat16.

    python examples/low_precision_state.py --steps 600 --seeds 3

The last row rounds to nearest, which the library does not do: it is there to show why.
"""

import contextlib
import dataclasses
import statistics
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import optax
import tyro

from optax_adamod import _storage, adamod
from stdlib_text import load_text
from warmup_free_transformer import (
    B2,
    BATCH,
    CONTEXT,
    Options,
    final_loss,
    save_losses,
    train,
)

MU, NU, BOUND = ({f"{name}_dtype": "bfloat16"} for name in ("mu", "nu", "bound"))
CASES = {
    "float32": {},
    "bfloat16 mu and bound": MU | BOUND,
    "bfloat16 mu, nu and bound": MU | NU | BOUND,
    "the same, rounded to nearest": MU | NU | BOUND,
}


def bytes_per_parameter(tx: optax.GradientTransformation) -> int:
    state = tx.init(jnp.zeros(1024))
    averages = [optax.tree.get(state, name) for name in ("mu", "nu", "bound")]
    return sum(x.nbytes for x in jax.tree.leaves(averages)) // 1024


@contextlib.contextmanager
def rounded_to_nearest() -> Iterator[None]:
    """Rounds bfloat16 averages to nearest, in whatever is compiled meanwhile."""
    jax.clear_caches()
    with mock.patch.object(
        _rounding, "stochastic_round", lambda x, _: x.astype(jnp.bfloat16)
    ):
        yield
    jax.clear_caches()


def main(options: Options) -> dict[str, list[list[float]]]:
    """Runs the comparison; returns the losses by case, seed and step."""
    text = load_text(options.text, at_least=BATCH * CONTEXT)
    options.output.mkdir(parents=True, exist_ok=True)
    runs: dict[str, list[list[float]]] = {name: [] for name in CASES}
    for seed in range(options.seeds):
        for name, dtypes in CASES.items():
            tx = adamod(options.learning_rate, b2=B2, b3=options.b3, **dtypes)
            nearest = name.endswith("nearest")
            with rounded_to_nearest() if nearest else contextlib.nullcontext():
                runs[name].append(train(name, tx, text, seed, options))
    print(
        "| averages | bytes a parameter | final loss, nats | lowest to highest seed |"
    )
    print("| --- | --- | --- | --- |")
    for name, losses in runs.items():
        size = bytes_per_parameter(adamod(0.1, **CASES[name]))
        finals = [final_loss(x) for x in losses]
        print(
            f"| {name} | {size} | {statistics.fmean(finals):.3f} | {min(finals):.3f} "
            f"to {max(finals):.3f} |"
        )
    losses = options.output / "losses.csv"
    save_losses(runs, losses)
    print(f"losses of every step: {losses}")
    return runs


if __name__ == "__main__":
    defaults = dataclasses.replace(
        Options(), steps=600, output=Path("outputs/low_precision_state")
    )
    try:
        main(tyro.cli(Options, default=defaults, description=__doc__))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
