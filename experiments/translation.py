"""German to English, by Adam, Adam with warm-up and AdaMod.

Babel's phrases and a small Transformer by default; IWSLT'14 and fairseq's
transformer_iwslt_de_en, with the paper's settings, at full size:

    python -m experiments.translation
    python -m experiments.translation --size full
"""

import dataclasses
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import sacrebleu
from flax import nnx
from tokenizers import Tokenizer

from examples.common.options import check_counts, check_rates
from experiments.command import command
from experiments.data.translation import (
    PAD,
    Encoded,
    Pairs,
    decode,
    encode,
    held_out_batches,
    iwslt14_pairs,
    laptop_pairs,
    train_tokenizer,
    training_batches,
    within,
)
from experiments.models.decoding import beam_search, greedy_search
from experiments.models.translator import Translator, label_smoothed_loss
from experiments.report import final_table, report
from experiments.training import Batch, History, Run, Task, train_all
from optax_adamod import adamodw

B2 = 0.98
WEIGHT_DECAY = 1e-4  # decoupled, as in fairseq's Adam and the authors' AdaMod
LABEL_SMOOTHING = 0.1
BEAM = 5
METRICS = (f"BLEU, beam {BEAM}", "BLEU, greedy", "validation loss", "loss")


@dataclasses.dataclass(frozen=True)
class Size:
    """What differs between a laptop and the paper."""

    depth: int  # layers of the encoder, and of the decoder
    width: int
    hidden: int  # of the feed-forward layers
    heads: int
    dropout: float
    vocabulary: int  # of the byte-pair encoding of both languages
    lengths: tuple[int, ...]  # to which batches are padded, in tokens
    tokens: int  # a batch, of each language
    rates: tuple[float, ...]
    b3: float
    steps: int
    row_every: int
    warmup: int  # steps
    after_warmup: Literal["constant", "inverse square root"]


SIZES = {
    "laptop": Size(
        depth=4,
        width=64,
        hidden=128,
        heads=4,
        dropout=0.1,
        vocabulary=1000,
        lengths=(12, 24),
        tokens=512,
        rates=(3e-3,),
        b3=0.99,
        steps=800,
        row_every=400,
        warmup=250,
        after_warmup="constant",
    ),
    "full": Size(
        depth=6,
        width=512,
        hidden=1024,
        heads=4,
        dropout=0.3,
        vocabulary=10_000,
        lengths=(16, 32, 48, 64, 96, 128, 256),
        tokens=4000,
        rates=(5e-4,),
        b3=0.9999,
        steps=50_000,
        row_every=2_500,
        warmup=4000,
        after_warmup="inverse square root",
    ),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Compares optimizers on translation from German to English."""

    size: Literal["laptop", "full"] = "laptop"
    """Laptop: phrases from Babel's locale data, minutes on two cores. Full: IWSLT'14
    and the paper's model, hours on a GPU."""
    rates: tuple[float, ...] = ()
    """Learning rates of every optimizer; by default 3e-3 or, at full size, 5e-4."""
    steps: int | None = None
    """Training steps of each run; by default 800 or, at full size, 50,000."""
    b3: float | None = None
    """AdaMod's b3; by default 0.99 or, at full size, 0.9999."""
    seeds: int = 3
    """How often to repeat everything."""
    data: str | None = None
    """At full size: folder or hub name of IWSLT'14's files."""
    output: Path = Path("outputs")
    """Folder for checkpoints, tables and figures; a run that was stopped goes on."""

    def __post_init__(self) -> None:
        size = SIZES[self.size]
        for name in ("rates", "steps", "b3"):
            if getattr(self, name) in ((), None):
                object.__setattr__(self, name, getattr(size, name))
        check_counts(self, "steps", "seeds")
        check_rates(self)
        if self.b3 is None or not 0 <= self.b3 < 1:
            raise ValueError(f"--b3 must be in [0, 1), got {self.b3}.")
        if self.data is not None and self.size == "laptop":
            raise ValueError("--data needs --size full; Babel's phrases are made.")


def training_loss(model: nnx.Module, batch: Batch) -> jax.Array:
    logits = model(batch["source"], batch["target"])
    return label_smoothed_loss(logits, batch["target"], LABEL_SMOOTHING)


@nnx.jit
def held_out_loss(model: Translator, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Returns the cross-entropy in nats per token, and the number of tokens."""
    loss = label_smoothed_loss(
        model(batch["source"], batch["target"]), batch["target"], 0
    )
    return loss, jnp.sum(batch["target"] != PAD)


def bleu(
    search: Callable[[np.ndarray, int], jax.typing.ArrayLike],
    tokenizer: Tokenizer,
    batches: Sequence[Batch],
) -> float:
    """Returns sacrebleu's BLEU of what ``search`` makes of the sources.

    It may take 1.2 times the source's padded length and 10 tokens, as in fairseq.
    """
    translations, references = [], []
    for batch in batches:
        is_pair = batch["target"][:, 0] != PAD  # and not filling
        length = int(1.2 * batch["source"].shape[1]) + 10
        found = np.asarray(search(batch["source"], length))
        translations += decode(tokenizer, found[is_pair])
        references += decode(tokenizer, batch["target"][is_pair])
    return sacrebleu.corpus_bleu(translations, [references]).score


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The tokens of all pairs."""

    tokenizer: Tokenizer
    train: list[Encoded]
    validation: list[Encoded]
    test: list[Encoded]

    @property
    def checksum(self) -> int:
        """Another release of Babel, say, makes another corpus."""
        return zlib.crc32(repr((self.train, self.validation, self.test)).encode())


def tokenize(pairs: Pairs, vocabulary: int, longest: int) -> Corpus:
    """Returns the pairs of up to ``longest`` tokens, and says how many are longer."""
    tokenizer = train_tokenizer(pairs.train, vocabulary)
    splits: dict[str, list[Encoded]] = {}
    for split, texts in vars(pairs).items():
        encoded = encode(tokenizer, texts)
        splits[split] = within(encoded, longest)
        print(
            f"{split}: {len(splits[split]):,} pairs, "
            f"{len(encoded) - len(splits[split]):,} of over {longest} tokens left out"
        )
    return Corpus(tokenizer, **splits)


def create_task(size: Size, steps: int, corpus: Corpus) -> Task:
    """Returns the task: the same model, batches and evaluation for all optimizers."""
    tokenizer = corpus.tokenizer
    validation, test = (
        held_out_batches(x, size.lengths, size.tokens)
        for x in (corpus.validation, corpus.test)
    )

    def create_model(rngs: nnx.Rngs) -> Translator:
        return Translator(
            tokenizer.get_vocab_size(),
            size.depth,
            size.width,
            size.hidden,
            size.heads,
            size.dropout,
            rngs=rngs,
        )

    def evaluate(model: nnx.Module) -> dict[str, float]:
        assert isinstance(model, Translator)
        model.eval()  # without dropout
        losses, tokens = np.transpose([held_out_loss(model, x) for x in validation])
        beam = bleu(lambda x, n: beam_search(model, x, n, BEAM), tokenizer, test)
        greedy = bleu(lambda x, n: greedy_search(model, x, n), tokenizer, test)
        return {
            "validation loss": float(np.average(losses, weights=tokens)),
            "BLEU, greedy": greedy,
            f"BLEU, beam {BEAM}": beam,
        }

    return Task(
        create_model=create_model,
        loss=training_loss,
        batches=lambda seed: training_batches(
            corpus.train, size.lengths, size.tokens, seed
        ),
        evaluate=evaluate,
        steps=steps,
        row_every=size.row_every,
    )


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
    size: Size, learning_rate: float, b3: float
) -> dict[str, optax.GradientTransformation]:
    """Returns the optimizers to compare, by their names in the table."""
    schedule = warmed_up(size, learning_rate)
    return {
        "Adam": optax.adamw(learning_rate, b2=B2, weight_decay=WEIGHT_DECAY),
        f"Adam, {size.warmup:,} steps of warm-up": optax.adamw(
            schedule, b2=B2, weight_decay=WEIGHT_DECAY
        ),
        f"AdaMod, b3 {b3:g}": adamodw(
            learning_rate, b2=B2, b3=b3, weight_decay=WEIGHT_DECAY
        ),
    }


def main(options: Options) -> History:
    size = SIZES[options.size]
    assert options.steps is not None
    assert options.b3 is not None
    full = options.size == "full"
    pairs = iwslt14_pairs(options.data) if full else laptop_pairs()
    corpus = tokenize(pairs, size.vocabulary, size.lengths[-1])
    task = create_task(size, options.steps, corpus)
    runs = [
        Run(
            name, transformation, rate, seed,
            options.b3 if name.startswith("AdaMod") else None,
        )
        for rate in options.rates
        for name, transformation in optimizers(size, rate, options.b3).items()
        for seed in range(options.seeds)
    ]  # fmt: skip
    output = options.output / f"translation_{options.size}"
    settings = dataclasses.asdict(size) | {
        "steps": options.steps,
        "data": options.data,
        "tokens' checksum": corpus.checksum,
    }
    for name in ("rates", "b3"):
        del settings[name]
    history = train_all(task, runs, output / "runs", settings)
    metric, *others = METRICS
    tables = [final_table(history, x, 1) for x in others]
    report("translation", history, metric, output, extra=tables)
    return history


if __name__ == "__main__":
    command(main, Options, __doc__)
