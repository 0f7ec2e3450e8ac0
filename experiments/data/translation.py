"""Pairs of sentences as batches of tokens: byte-pair encoding, buckets, padding."""

import dataclasses
from collections.abc import Iterable, Sequence

import grain
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from experiments.data.locale_pairs import Pair, locale_pairs

PAD, END = 0, 1  # END also begins the decoder's input, as in fairseq
IWSLT14 = "bbaaaa/iwslt14-de-en"

Encoded = tuple[list[int], list[int]]  # source and target, each closed by END


@dataclasses.dataclass(frozen=True)
class Pairs:
    """German and English sentences."""

    train: list[Pair]
    validation: list[Pair]
    test: list[Pair]


def laptop_pairs(held_out: int = 200) -> Pairs:
    """Returns Babel's pairs, ``held_out`` of them for each of validation and test."""
    pairs = locale_pairs()
    return Pairs(
        pairs[2 * held_out :], pairs[:held_out], pairs[held_out : 2 * held_out]
    )


def iwslt14_pairs(source: str | None = None) -> Pairs:
    """Returns IWSLT'14, lower-cased, in the splits that fairseq's recipe makes.

    They are 160,239 pairs to train on, 7,283 for validation and 6,750 for the test.

    Args:
      source: Name on the Hugging Face hub, or folder with train, validation and test
        as .parquet, .jsonl or .json files; by default ``bbaaaa/iwslt14-de-en``.

    Raises:
      OSError: They cannot be loaded; the message says where to put them.
      ValueError: A row is not ``{"translation": {"de": ..., "en": ...}}``.
    """
    # It takes seconds, for which the laptop's size need not wait.
    from experiments.data.hub import load

    # The converted branch: of the main one, what loads it is a program.
    name, revision = (source, None) if source else (IWSLT14, "refs/convert/parquet")
    splits = {
        split: _pairs_of(load(name, split, {"translation"}, revision), split)
        for split in ("train", "validation", "test")
    }
    return Pairs(**splits)


def _pairs_of(rows: Iterable, split: str) -> list[Pair]:
    pairs = []
    for row in rows:
        try:
            german, english = row["translation"]["de"], row["translation"]["en"]
            pairs.append((german.lower(), english.lower()))
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(
                f"the rows of the split {split!r} must be "
                f'{{"translation": {{"de": ..., "en": ...}}}}, got {row!r}.'
            ) from error
    return pairs


def train_tokenizer(pairs: Sequence[Pair], vocabulary: int) -> Tokenizer:
    """Learns one byte-pair encoding for both languages; digits stay single tokens.

    It works on bytes, so that it knows every text, and decodes to the very same text.
    """
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    by_byte = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, by_byte])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<pad>", "<end>"],  # PAD and END
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for pair in pairs for text in pair), trainer)
    return tokenizer


def within(pairs: Sequence[Encoded], length: int) -> list[Encoded]:
    """Returns the pairs of which neither side has more than ``length`` tokens."""
    return [pair for pair in pairs if max(map(len, pair)) <= length]


def encode(tokenizer: Tokenizer, pairs: Sequence[Pair]) -> list[Encoded]:
    """Returns the tokens of each pair."""
    german, english = (
        [[*x.ids, END] for x in tokenizer.encode_batch([pair[i] for pair in pairs])]
        for i in range(2)
    )
    return list(zip(german, english, strict=True))


def decode(tokenizer: Tokenizer, tokens: np.ndarray) -> list[str]:
    """Returns the text of each row; END and PAD are no text."""
    return tokenizer.decode_batch(tokens.tolist(), skip_special_tokens=True)


def pad(pairs: Sequence[Encoded], length: int) -> dict[str, np.ndarray]:
    """Returns ``source`` and ``target``, int32[pairs, length]."""
    batch = np.full((2, len(pairs), length), PAD, np.int32)
    for row, pair in enumerate(pairs):
        for side, tokens in enumerate(pair):
            batch[side, row, : len(tokens)] = tokens
    return {"source": batch[0], "target": batch[1]}


def buckets(
    pairs: Sequence[Encoded], lengths: Sequence[int]
) -> dict[int, list[Encoded]]:
    """Sorts pairs by the shortest of ``lengths`` that holds them."""
    sorted_pairs: dict[int, list[Encoded]] = {length: [] for length in lengths}
    for pair in pairs:
        longer = max(map(len, pair))
        fits = [length for length in lengths if longer <= length]
        if not fits:
            raise ValueError(
                f"a pair of {longer} tokens fits none of the lengths {tuple(lengths)}."
            )
        sorted_pairs[min(fits)].append(pair)
    return {length: chosen for length, chosen in sorted_pairs.items() if chosen}


def training_batches(
    pairs: Sequence[Encoded], lengths: Sequence[int], tokens: int, seed: int
) -> grain.MapDataset:
    """Returns endless batches of about ``tokens`` source and target tokens each.

    Every batch is padded to one of ``lengths``, so that a step is compiled that often
    and no more. Each length comes as often as it would in passes over all pairs.
    """
    datasets, weights = [], []
    for length, chosen in buckets(pairs, lengths).items():
        rows = max(1, tokens // length)
        data = grain.MapDataset.source(chosen).seed(seed).shuffle().repeat()
        datasets.append(
            data.batch(rows, batch_fn=lambda pairs, length=length: pad(pairs, length))
        )
        weights.append(len(chosen) / rows)
    return grain.MapDataset.mix(datasets, weights)


def held_out_batches(
    pairs: Sequence[Encoded], lengths: Sequence[int], tokens: int
) -> list[dict[str, np.ndarray]]:
    """Returns each pair once, sorted by length, in batches of the training's shapes.

    The last batch of each length is filled with rows of nothing but PAD.
    """
    batches = []
    for length, chosen in buckets(pairs, lengths).items():
        rows = max(1, tokens // length)
        for start in range(0, len(chosen), rows):
            part = chosen[start : start + rows]
            batches.append(pad(part + [([], [])] * (rows - len(part)), length))
    return batches
