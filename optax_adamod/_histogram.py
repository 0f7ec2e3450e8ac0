"""Histograms that are counted where the arrays are."""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_adamod._float8 import Float8Array, as_float8, is_float8

INT32_MAX = np.iinfo(np.int32).max  # coordinates that an int32 can count


class Log10Histogram(NamedTuple):
    """Numbers of coordinates by magnitude: int32, or int64 from 2**31 in all."""

    counts: jax.Array  #: one for each bin; a bin includes its lower edge.
    below: jax.Array  #: shape=(), below the first edge, including zeros.
    above: jax.Array  #: shape=(), at or above the last edge, including infinities.
    nan: jax.Array  #: shape=(), NaN; in learning rates, no gradient so far.


def log10_histogram(tree: Any, bins: Sequence[float] | np.ndarray) -> Log10Histogram:
    r"""Counts the coordinates of a tree by the logarithm of their magnitude.

    The devices that hold the tree count it, so only the counts leave them, on every
    sharding. On a CPU of 2 cores, the bounded rates of 25 million parameters and their
    histogram in 32 bins took 0.9 to 1.7 times as long as an update (``python -m
    benchmarks.diagnostics``, seven runs). Every leaf is compiled separately, and
    compiling takes longer with more bins. To save time, concatenate small leaves that
    are on one device.

    Args:
      tree: A tree of arrays, such as one of :class:`optax_adamod.LearningRates`. A
        :class:`optax_adamod.Float8Array` in it stands for its numbers.
      bins: Edges of the bins as increasing powers of ten within -37 and 38: ``k + 1``
        edges for ``k`` bins. A bin includes its lower edge and not its upper one.

    Returns:
      The counts in the bins, below and above them, and of NaN. They are exact, and add
      up to the size of the tree. Without 64-bit mode pass int64 counts to NumPy, not to
      ``jnp``.

    Raises:
      ValueError: If ``bins`` is not such a sequence.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_adamod import log10_histogram
      >>> histogram = log10_histogram(jnp.array([1e-3, 0.2, 0.5, 7.]), bins=[-2, -1, 0])
      >>> print(histogram.counts, histogram.below, histogram.above, histogram.nan)
      [0 2] 1 1 0

    .. seealso:: :func:`optax_adamod.learning_rates`.
    """
    edges = _edges(bins)
    leaves = [
        as_float8(x) if is_float8(x) else jnp.asarray(x)
        for x in jax.tree.leaves(tree, is_leaf=is_float8)
    ]
    size = sum(x.size for x in leaves)
    with _counting(size) as dtype, jax.numpy_dtype_promotion("standard"):
        at_least = jnp.zeros(1 + len(edges), dtype)
        for x in leaves:
            at_least += _count_magnitudes(x, edges, dtype)
        below, *_ = counts = at_least[:-1] - at_least[1:]
        return Log10Histogram(
            counts=counts[1:],
            below=below,
            above=at_least[-1],
            nan=jnp.asarray(size, dtype) - at_least[0],
        )


def _edges(bins: Any) -> tuple[float, ...]:
    """Returns the edges of the bins from their powers of ten."""
    powers = np.asarray(bins, np.float64)
    increasing = powers.ndim == 1 and powers.size > 1 and np.all(np.diff(powers) > 0)
    # float32 holds no other powers of ten.
    if not (increasing and powers[0] >= -37 and powers[-1] <= 38):
        raise ValueError(
            "bins must be at least two increasing powers of ten within [-37, 38], such "
            f"as np.linspace(-8, 0, 33), got {bins!r}."
        )
    return tuple((10.0**powers).tolist())


@contextlib.contextmanager
def _counting(size: int) -> Iterator[np.dtype]:
    """Yields a dtype that counts to ``size``, and lets JAX use it."""
    if size <= INT32_MAX:
        yield np.dtype(np.int32)
    else:
        with jax.enable_x64(True):
            yield np.dtype(np.int64)


@functools.partial(jax.jit, static_argnames=("edges", "dtype"))
def _count_magnitudes(x, edges: tuple[float, ...], dtype: np.dtype):
    """Counts the elements that are at least 0, which NaN is not, or each edge."""
    x = x.dequantize() if isinstance(x, Float8Array) else x
    x = jnp.abs(x.astype(jnp.result_type(x, jnp.float32)))
    # XLA assumes that magnitudes are at least 0, even NaN.
    x = jnp.where(jnp.isnan(x), -1, x)
    return _count_at_least(x, np.asarray((0.0, *edges), x.dtype), dtype)


def _count_at_least(
    x: jax.Array, edges: np.ndarray | jax.Array, dtype: np.dtype
) -> jax.Array:
    """Returns how many elements are at least each edge."""
    # Each is one pass on its platform. On CPU the second would write all comparisons to
    # memory; elsewhere the first would take long to compile.
    return jax.lax.platform_dependent(
        x,
        edges,
        cpu=functools.partial(_count_together, dtype),
        default=functools.partial(_count_apart, dtype),
    )


def _count_together(dtype, x, edges):
    """One reduction of as many operands as there are edges."""
    counts = jax.lax.reduce(
        [(x >= edge).astype(dtype) for edge in edges],
        [np.zeros((), dtype)] * len(edges),
        lambda a, b: [p + q for p, q in zip(a, b, strict=True)],
        tuple(range(x.ndim)),
    )
    return jnp.stack(counts)


def _count_apart(dtype, x, edges):
    """One reduction over the comparisons with all edges."""
    edges = edges.reshape((1,) * x.ndim + (-1,))
    return jnp.sum(x[..., None] >= edges, axis=tuple(range(x.ndim)), dtype=dtype)
