"""Do embeddings of rare words train, and how far do they move when they wake?

A Post-LN Transformer on the words of Python's standard library, all of them, by Adam,
Adam with warm-up, AdaMod, and variants of AdaMod that treat sleeping coordinates
differently (:mod:`experiments.lazy_bounds`):

    python -m experiments.sleeping_words
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from examples.common.options import check_counts, check_decays, check_heads, check_rates
from examples.common.stdlib_text import FOLDER
from examples.common.transformer import Transformer, next_token_losses
from experiments.command import command
from experiments.data.text import batches, unigram_entropy
from experiments.data.words import Words, load_words
from experiments.language_modelling import loss
from experiments.plateau import plateau_table
from experiments.report import report
from experiments.sleeping import runs_of
from experiments.training import History, Task, train_all
from experiments.waking import (
    AWAKE,
    SHARES,
    awake_share,
    losses_table,
    recorded,
    updates_table,
)

HEADS = 4
ROWS = 5  # of a run's history
VALIDATED = 64  # windows at once
VALIDATIONS = 24  # so many times, spread over the text
BY_WORD_TITLE = (
    "Validation loss after a word whose embedding is awake in the given share of steps"
)
BY_WORD = [f"after words in {share}" for share in AWAKE]
NEVER = "after words never trained"


@dataclasses.dataclass(frozen=True)
class Options:
    """Compares what AdaMod may do with sleeping embeddings."""

    rates: tuple[float, ...] = (3e-3,)
    """Learning rates."""
    seeds: int = 3
    """How often to repeat everything, from other weights and on other batches."""
    steps: int = 2000
    """Training steps of each run: 20 horizons of b3 0.99."""
    warmup: int = 300
    """Steps of Adam's linear warm-up."""
    b2: float = 0.999
    """Decay rate of the second moment, of all optimizers."""
    b3: float = 0.99
    """AdaMod's b3; its bound opens over about 1 / (1 - b3) steps."""
    depth: int = 12
    """Transformer blocks."""
    width: int = 32
    """Features of each word, a multiple of 4, the number of heads."""
    context: int = 16
    """Words that the model sees."""
    batch: int = 8
    """Windows of text in a batch."""
    optimizers: tuple[str, ...] = ()
    """Which optimizers, by default all."""
    text: Path = FOLDER
    """Folder whose .py files are the text."""
    output: Path = Path("outputs/sleeping_words")
    """Folder for checkpoints, tables and figures; a run that was stopped goes on."""

    def __post_init__(self) -> None:
        check_counts(
            self, "seeds", "steps", "warmup", "depth", "width", "context", "batch"
        )
        check_heads(self, HEADS)
        check_rates(self)
        check_decays(self, "b2", "b3")


@nnx.jit
def losses_of(model: nnx.Module, windows: jax.Array) -> jax.Array:
    return next_token_losses(model, windows)


def validate(
    model: nnx.Module, words: Words, context: int, batch: int
) -> dict[str, float]:
    """Returns the validation loss, of all words and by how often the last one wakes."""
    starts = np.linspace(
        0, len(words.validation) - context - 1, VALIDATED * VALIDATIONS, dtype=int
    )
    windows = words.validation[starts[:, None] + np.arange(context + 1)]
    parts = [losses_of(model, jnp.asarray(x)) for x in np.split(windows, VALIDATIONS)]
    losses = np.concatenate(parts)
    last = awake_share(words.counts, batch * context)[windows[:, :-1]]
    row = {"validation loss": float(losses.mean())}
    group = np.where(last > 0, np.searchsorted(SHARES, last), len(AWAKE))
    for index, name in enumerate((*BY_WORD, NEVER)):
        if (group == index).any():
            row[name] = float(losses[group == index].mean())
    return row


def main(options: Options) -> History:
    words = load_words(options.text, at_least=options.context + 1)
    task = Task(
        create_model=lambda rngs: Transformer(
            options.depth, options.width, HEADS, options.context,
            vocabulary=len(words.vocabulary), rngs=rngs,
        ),
        loss=loss,
        batches=lambda seed: batches(
            words.train, options.context, seed, options.batch
        ),
        steps=options.steps,
        row_every=max(1, options.steps // ROWS),
        evaluate=lambda model: validate(model, words, options.context, options.batch),
        record=recorded,
    )  # fmt: skip
    settings = dataclasses.asdict(options)
    for name in ("rates", "seeds", "optimizers", "output"):
        del settings[name]
    runs = runs_of(
        options,
        lambda tree: tree["tokens"]["embedding"],
        options.batch * options.context * options.width,
    )
    if options.optimizers:
        runs = [run for run in runs if run.optimizer in options.optimizers]
    history = train_all(task, runs, options.output / "runs", settings)
    report(
        "sleeping_words", history, "validation loss", options.output,
        extra=[
            losses_table(history, (*BY_WORD, NEVER), BY_WORD_TITLE),
            updates_table(history),
            plateau_table(history, unigram_entropy(words.train), "words"),
        ],
    )  # fmt: skip
    return history


if __name__ == "__main__":
    command(main, Options, __doc__)
