"""German to English with Adam, Adam with warm-up and AdaMod: the paper's section 4.

The laptop's size, the default, translates phrases from Babel's locale data with a small
Transformer. The full size is IWSLT'14 and fairseq's transformer_iwslt_de_en, by the
paper's settings.

    python -m examples.paper.translation
    python -m examples.paper.translation --size full
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import sacrebleu
import tyro
from flax import nnx
from tokenizers import Tokenizer

from optax_adamod import adamodw

from .data.translation import (
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
from .models.decoding import beam_search, greedy_search
from .models.translator import Translator, label_smoothed_loss
from .report import report
from .training import Batch, Run, Task, train

B2 = 0.98
WEIGHT_DECAY = 1e-4  # decoupled, as in fairseq's Adam and the authors' AdaMod
LABEL_SMOOTHING = 0.1
BEAM = 5
LENGTH_PENALTY = 1.0


@dataclasses.dataclass(frozen=True)
class Size:
    """What differs between a laptop and the paper."""

    depth: int  # layers of the encoder, and of the decoder
    width: int
    hidden: int  # of the feed-forward layers
    heads: int
    dropout: float
    vocabulary: int  # of the joint byte-pair encoding
    lengths: tuple[int, ...]  # to which batches are padded, in tokens
    tokens: int  # a batch, of each language
    learning_rates: tuple[float, ...]
    b3: float
    steps: int
    evaluate_every: int
    warmup: Callable[[float], optax.Schedule]


def linear_warmup(steps: int) -> Callable[[float], optax.Schedule]:
    """Rises linearly over ``steps``, then stays."""
    return lambda peak: optax.linear_schedule(peak / steps, peak, steps)


def inverse_sqrt_warmup(steps: int) -> Callable[[float], optax.Schedule]:
    """Rises linearly from 1e-7 over ``steps``, then falls as 1 / sqrt(step)."""

    def falling(peak: float) -> optax.Schedule:
        return lambda count: peak * jnp.sqrt(steps / (count + steps))

    return lambda peak: optax.join_schedules(
        [optax.linear_schedule(1e-7, peak, steps), falling(peak)], [steps]
    )


SIZES = {
    "laptop": Size(
        depth=6,
        width=64,
        hidden=128,
        heads=4,
        dropout=0.1,
        vocabulary=1000,
        lengths=(12, 24),
        tokens=512,
        learning_rates=(3e-3,),
        b3=0.99,
        steps=800,
        evaluate_every=400,
        warmup=linear_warmup(250),
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
        learning_rates=(5e-4,),
        b3=0.9999,
        steps=50_000,
        evaluate_every=5_000,
        warmup=inverse_sqrt_warmup(4000),
    ),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Compares optimizers on translation from German to English."""

    size: Literal["laptop", "full"] = "laptop"
    """Babel's phrases and a small model, or IWSLT'14 and the paper's."""
    learning_rates: tuple[float, ...] = ()
    """Learning rates of every optimizer; by default the size's own."""
    steps: int | None = None
    """Training steps of each run; by default the size's own."""
    seeds: int = 3
    """How often to repeat the comparison, from other weights and on other batches."""
    data: Path | None = None
    """Folder with IWSLT'14's train, validation and test for the full size; by default
    they are downloaded."""
    output: Path = Path("outputs/translation")
    """Folder for checkpoints, table and figure, by size."""

    def __post_init__(self) -> None:
        for name in ("steps", "seeds"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} must be at least 1, got {value}.")
        for rate in self.learning_rates:
            if not rate > 0:
                raise ValueError(f"--learning-rates must be positive, got {rate}.")
        if self.data is not None and self.size != "full":
            raise ValueError("--data is for --size full; the laptop's size needs none.")


@nnx.jit
def training_loss(model: Translator, batch: Batch) -> jax.Array:
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
    search: Callable[[jax.Array], jax.Array],
    tokenizer: Tokenizer,
    batches: Sequence[Batch],
) -> float:
    """Returns sacrebleu's BLEU of what ``search`` makes of the sources."""
    translations, references = [], []
    for batch in batches:
        is_pair = batch["target"][:, 0] != PAD  # and not filling
        found = np.asarray(search(batch["source"]))
        translations += decode(tokenizer, found[is_pair])
        references += decode(tokenizer, batch["target"][is_pair])
    return sacrebleu.corpus_bleu(translations, [references]).score


def create_task(size: Size, steps: int, pairs: Pairs) -> Task:
    """Returns the task: the same model, batches and evaluation for all optimizers."""
    tokenizer = train_tokenizer(pairs.train, size.vocabulary)
    longest = size.lengths[-1]
    encoded: dict[str, list[Encoded]] = {}
    for split, chosen in vars(pairs).items():
        encoded[split] = within(encode(tokenizer, chosen), longest)
        if left_out := len(chosen) - len(encoded[split]):
            print(
                f"{split}: {left_out:,} of {len(chosen):,} pairs are left out, for they "
                f"are longer than {longest} tokens"
            )
    validation, test = (
        held_out_batches(encoded[split], size.lengths, size.tokens)
        for split in ("validation", "test")
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

    def evaluate(model: Translator) -> dict[str, float]:
        model.eval()  # without dropout
        losses, tokens = np.transpose([held_out_loss(model, x) for x in validation])
        values = {
            "validation loss": float(np.average(losses, weights=tokens)),
            "BLEU, greedy": bleu(
                lambda source: greedy_search(model, source, longest), tokenizer, test
            ),
            f"BLEU, beam {BEAM}": bleu(
                lambda source: beam_search(model, source, longest, BEAM),
                tokenizer,
                test,
            ),
        }
        model.train()
        return values

    return Task(
        create_model=create_model,
        loss=training_loss,
        batches=lambda seed: training_batches(
            encoded["train"], size.lengths, size.tokens, seed
        ),
        evaluate=evaluate,
        steps=steps,
        evaluate_every=size.evaluate_every,
    )


def optimizers(
    size: Size, learning_rate: float
) -> dict[str, optax.GradientTransformation]:
    """Returns the optimizers to compare, by their names in the table."""
    adamod = adamodw(learning_rate, b2=B2, b3=size.b3, weight_decay=WEIGHT_DECAY)
    warmed_up = size.warmup(learning_rate)
    return {
        "Adam": optax.adamw(learning_rate, b2=B2, weight_decay=WEIGHT_DECAY),
        "Adam, warm-up": optax.adamw(warmed_up, b2=B2, weight_decay=WEIGHT_DECAY),
        f"AdaMod, b3 {size.b3:g}": adamod,
    }
