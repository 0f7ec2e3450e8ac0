"""Windows of text, to predict each token, a byte or a word, from those before it."""

from typing import Any

import grain
import numpy as np


def batches(text: np.ndarray, context: int, seed: int, size: int) -> grain.MapDataset:
    """Returns the batch of every step, random windows: int32[size, context + 1].

    Windows start at another token each, until all have been drawn.
    """
    windows: Any = np.lib.stride_tricks.sliding_window_view(text, context + 1)
    data = grain.MapDataset.source(windows).seed(seed).shuffle().repeat()
    return data.map(lambda window: {"tokens": window.astype(np.int32)}).batch(size)


def unigram_entropy(text: np.ndarray) -> float:
    """Returns the loss of a model that knows how common each token is, in nats."""
    share = np.bincount(text) / len(text)
    share = share[share > 0]
    return float(-np.sum(share * np.log(share)))
