"""Batches that change on the way: another language, easy stretches, small gradients."""

from collections.abc import Callable
from typing import Any

import numpy as np

from experiments.common.comparison import Spans
from experiments.common.training import Batches
from experiments.data.text import batches


def within(spans: Spans, step: int) -> bool:
    return any(start <= step < end for start, end in spans)


class Switching:
    """One sequence of batches, but another one within the spans."""

    def __init__(self, usual: Batches, other: Batches, spans: Spans):
        self.usual, self.other, self.spans = usual, other, spans

    def __getitem__(self, step: int) -> Any:
        return (self.other if within(self.spans, step) else self.usual)[step]


class Weighted:
    """Batches with a weight: of their gradients, as the loss of the task says."""

    def __init__(self, batches: Batches, weight: Callable[[int], float]):
        self.batches, self.weight = batches, weight

    def __getitem__(self, step: int) -> dict[str, Any]:
        return {**self.batches[step], "weight": np.float32(self.weight(step))}


def easy_batches(context: int, size: int) -> Batches:
    """Returns batches in which every byte is a space."""
    return batches(np.full(2 * context, ord(" "), np.uint8), context, 0, size)
