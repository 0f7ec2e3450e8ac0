"""German to English, by Adam, Adam with warm-up and AdaMod.

Babel's phrases and a small Transformer by default; IWSLT'14 and fairseq's
transformer_iwslt_de_en, with the paper's settings, at full size:

    python -m experiments.translation
    python -m experiments.translation --size full
"""

import dataclasses
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from examples.common.options import check_counts, check_rates
from experiments.common.command import command
from experiments.common.report import final_table, report
from experiments.common.training import History, Run, train_all
from experiments.data.translation import iwslt14_pairs, laptop_pairs
from experiments.tasks.translation import (
    METRICS,
    SIZES,
    WEIGHT_DECAY,
    Size,
    task_of,
    tokenize,
)
from optax_adamod import adamodw

B2 = 0.98


@dataclasses.dataclass(frozen=True)
class Options:
    """Compares optimizers on translation from German to English."""

    size: Literal["laptop", "full"] = "laptop"
    """Laptop: phrases from Babel's locale data, minutes on two cores. Full: IWSLT'14
    and the paper's model, hours on a GPU."""
    rates: tuple[float, ...] = ()
    """Learning rates of every optimizer; by default 3e-3 or, at full size, 5e-4."""
    seeds: int = 3
    """How often to repeat everything."""
    data: str | None = None
    """At full size: folder or hub name of IWSLT'14's files."""
    output: Path = Path("outputs")
    """Folder for checkpoints and tables; a run that was stopped goes on."""

    def __post_init__(self) -> None:
        if not self.rates:
            object.__setattr__(self, "rates", SIZES[self.size].rates)
        check_counts(self, "seeds")
        check_rates(self)
        if self.data is not None and self.size == "laptop":
            raise ValueError("--data needs --size full; Babel's phrases are made.")


def warmed_up(size: Size, learning_rate: float) -> optax.Schedule:
    """Rises linearly; then stays, or falls with the root of the step as in fairseq."""
    warmup = size.warmup
    rise = optax.linear_schedule(learning_rate / warmup, learning_rate, warmup)
    if size.after_warmup == "constant":
        return rise

    # A joined schedule counts from where it begins; before, it is called in vain.
    def fall(count: jax.typing.ArrayLike) -> jax.Array:
        return learning_rate / jnp.sqrt(jnp.maximum(1.0, 1 + count / warmup))

    return optax.join_schedules([rise, fall], [warmup])


def optimizers(
    size: Size, learning_rate: float
) -> dict[str, optax.GradientTransformation]:
    """Returns the optimizers to compare, by their names in the table."""
    warm, decay = warmed_up(size, learning_rate), WEIGHT_DECAY
    return {
        "Adam": optax.adamw(learning_rate, b2=B2, weight_decay=decay),
        f"Adam, {size.warmup:,} steps of warm-up": optax.adamw(
            warm, b2=B2, weight_decay=decay
        ),
        f"AdaMod, b3 {size.b3:g}": adamodw(
            learning_rate, b2=B2, b3=size.b3, weight_decay=decay
        ),
    }


def main(options: Options) -> History:
    size = SIZES[options.size]
    full = options.size == "full"
    corpus = tokenize(iwslt14_pairs(options.data) if full else laptop_pairs(), size)
    runs = [
        Run(
            name, transformation, rate, seed,
            size.b3 if name.startswith("AdaMod") else None,
        )
        for rate in options.rates
        for name, transformation in optimizers(size, rate).items()
        for seed in range(options.seeds)
    ]  # fmt: skip
    output = options.output / f"translation_{options.size}"
    settings = dataclasses.asdict(size) | {
        "data": options.data, "tokens' checksum": corpus.checksum,
    }  # fmt: skip
    for name in ("rates", "b3"):
        del settings[name]
    history = train_all(task_of(size, corpus), runs, output / "runs", settings)
    metric, *others = METRICS
    tables = [final_table(history, x, 1) for x in others]
    report("translation", history, metric, output, extra=tables)
    return history


if __name__ == "__main__":
    command(main, Options, __doc__)
