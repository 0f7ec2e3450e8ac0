"""Translation from German to English: sizes, corpus, loss and evaluation."""

import dataclasses
import zlib
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import sacrebleu
from flax import nnx
from tokenizers import Tokenizer

from experiments.common.training import Batch, Task
from experiments.data.translation import (
    PAD,
    Encoded,
    Pairs,
    decode,
    encode,
    held_out_batches,
    laptop_pairs,
    train_tokenizer,
    training_batches,
    within,
)
from experiments.models.decoding import beam_search
from experiments.models.translator import Translator, label_smoothed_loss

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
        depth=4, width=64, hidden=128, heads=4, dropout=0.1, vocabulary=1000,
        lengths=(12, 24), tokens=512, rates=(3e-3,), b3=0.99, steps=800, row_every=400,
        warmup=250, after_warmup="constant",
    ),
    "full": Size(
        depth=6, width=512, hidden=1024, heads=4, dropout=0.3, vocabulary=10_000,
        lengths=(16, 32, 48, 64, 96, 128, 256), tokens=4000, rates=(5e-4,), b3=0.9999,
        steps=50_000, row_every=2_500, warmup=4000, after_warmup="inverse square root",
    ),
}  # fmt: skip


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


def tokenize(pairs: Pairs, size: Size) -> Corpus:
    """Returns the pairs that are short enough, and says how many are longer."""
    tokenizer = train_tokenizer(pairs.train, size.vocabulary)
    longest = size.lengths[-1]
    splits: dict[str, list[Encoded]] = {}
    for split, texts in vars(pairs).items():
        encoded = encode(tokenizer, texts)
        splits[split] = within(encoded, longest)
        print(
            f"{split}: {len(splits[split]):,} pairs, "
            f"{len(encoded) - len(splits[split]):,} of over {longest} tokens left out"
        )
    return Corpus(tokenizer, **splits)


def training_loss(model: nnx.Module, batch: Batch) -> jax.Array:
    logits = model(batch["source"], batch["target"])
    return label_smoothed_loss(logits, batch["target"], LABEL_SMOOTHING)


@nnx.jit
def held_out_loss(model: Translator, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Returns the cross-entropy in nats per token, and the number of tokens."""
    logits = model(batch["source"], batch["target"])
    loss = label_smoothed_loss(logits, batch["target"], 0)
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


def task_of(
    size: Size, corpus: Corpus | None = None, *, with_bleu: bool = True
) -> Task:
    """Returns the task on a corpus, by default Babel's.

    BLEU takes a beam search, which is longer than a short training.
    """
    of = tokenize(laptop_pairs(), size) if corpus is None else corpus
    validation, test = (
        held_out_batches(x, size.lengths, size.tokens) for x in (of.validation, of.test)
    )

    def create_model(rngs: nnx.Rngs) -> Translator:
        return Translator(
            of.tokenizer.get_vocab_size(), size.depth, size.width, size.hidden,
            size.heads, size.dropout, rngs=rngs,
        )  # fmt: skip

    def evaluate(model: nnx.Module) -> dict[str, float]:
        assert isinstance(model, Translator)
        model.eval()  # without dropout
        losses, tokens = np.transpose([held_out_loss(model, x) for x in validation])
        found = {"validation loss": float(np.average(losses, weights=tokens))}
        for name, beam in (("greedy", 1), (f"beam {BEAM}", BEAM)) if with_bleu else ():
            found[f"BLEU, {name}"] = bleu(
                lambda x, length, beam=beam: beam_search(model, x, length, beam),
                of.tokenizer,
                test,
            )
        return found

    return Task(
        create_model=create_model,
        loss=training_loss,
        batches=lambda seed: training_batches(
            of.train, size.lengths, size.tokens, seed
        ),
        evaluate=evaluate,
        steps=size.steps,
        row_every=size.row_every,
    )
