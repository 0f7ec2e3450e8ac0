"""Does the histogram count every coordinate once, on any device and sharding?"""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from helpers import COUNT, assert_few_units_apart, make_mesh
from optax_adamod import (
    Float8Array,
    ScaleByAdamodState,
    _histogram,
    held_by_bound,
    learning_rates,
    log10_histogram,
)

BINS = np.linspace(-3, 2, 6)


def numpy_counts(tree, bins=BINS):
    """What Log10Histogram holds, by numpy.histogram."""
    x = np.concatenate([np.abs(np.ravel(x)) for x in jax.tree.leaves(tree)])
    x = x.astype(np.float64)
    nan = np.isnan(x)
    with np.errstate(divide="ignore"):
        powers = np.log10(x[~nan])
    below, *counts, above = np.histogram(powers, [-np.inf, *bins, np.inf])[0]
    return np.asarray(counts), below, above, nan.sum()


def check(histogram, tree):
    chex.assert_trees_all_equal(tuple(map(np.asarray, histogram)), numpy_counts(tree))


def rates(shape, dtype=np.float32, seed=0):
    x = np.random.default_rng(seed).lognormal(sigma=4, size=shape).astype(dtype)
    x.flat[:5] = np.nan, np.inf, 0, -0.02, np.finfo(dtype).tiny
    return x


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_against_numpy(dtype, x64):
    tree = [jnp.asarray(rates(x)).astype(dtype) for x in ((30, 50), 33)]
    assert all(np.all(np.asarray(x) > 0) for x in numpy_counts(tree))
    check(log10_histogram(tree, BINS), tree)


def test_kinds_of_leaves():
    """Averages in 8 bits count as their numbers."""
    x = rates((1, 256))
    x[0, 5:] = np.clip(x[0, 5:], 1e-3, 1e3)
    narrow = Float8Array.quantize(np.abs(x), signed=False)  # NaN, and with it its group
    others = [
        jnp.asarray(3 + 4j), 7, 0.02, np.ones((0, 3)), None, np.int8(-3), jnp.ones(2),
    ]  # fmt: skip
    tree, expected = [*others, narrow], [*others, narrow.dequantize()]
    assert numpy_counts(expected)[3] == 128
    counts = log10_histogram(tree, BINS)
    check(counts, expected)
    assert counts.counts.dtype == jnp.int32
    assert sum(map(np.sum, counts)) == 6 + 256
    check(jax.jit(lambda tree: log10_histogram(tree, BINS))(tree), expected)
    # As Orbax restores them without a template.
    check(log10_histogram([*others, narrow._asdict()], BINS), expected)
    assert [x.tolist() for x in log10_histogram({}, [0, 1])] == [[0], 0, 0, 0]


def test_edges_belong_to_the_bin_above():
    x = jnp.asarray([1.0, 10.0, 100.0, 1000.0], jnp.float32)
    histogram = log10_histogram(x, [0, 1, 2])
    assert histogram.counts.tolist() == [1, 1]
    assert (histogram.below, histogram.above) == (0, 2)
    assert log10_histogram(x, [1, 2, 3]).below == 1


# Sizes that are not compiled elsewhere.
@pytest.mark.parametrize("way", [_histogram._count_together, _histogram._count_apart])
def test_both_ways_to_count(way):
    """One is for CPUs, the other for all else."""
    edges = np.asarray((0.0, *10.0**BINS), np.float32)
    for shape in ((7, 11, 13), (13,)):
        x = rates(shape)
        x = np.where(np.isnan(x), -1, np.abs(x))
        expected = [(x >= edge).sum() for edge in edges]
        assert way(np.dtype(np.int32), jnp.asarray(x), edges).tolist() == expected


def test_more_than_int32_counts(monkeypatch):
    """The same in int64, which no test can fill."""
    monkeypatch.setattr(_histogram, "INT32_MAX", 100)
    tree = {"w": rates((3, 50)), "b": rates(33, seed=1)}
    for count in (log10_histogram, jax.jit(log10_histogram, static_argnums=1)):
        histogram = count(tree, tuple(BINS))
        check(histogram, tree)
        assert all(x.dtype == np.int64 for x in histogram)


@pytest.mark.parametrize("shape", [(2**31,), (2**20, 2**13)])
def test_leaves_of_more_than_int32_counts(shape):
    """Compiled alone, for they would not fit into memory."""
    assert jnp.zeros(0).dtype == np.float32  # not in 64-bit mode
    leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
    small = jax.ShapeDtypeStruct((2**31 - 1,), jnp.float32)
    count = jax.jit(lambda x: log10_histogram(x, BINS))
    text = count.lower(leaf).as_text()
    assert re.search(r"reduce.*tensor<i64>", text)
    assert "i64>" not in re.sub(r"dimensions? = .*", "", count.lower(small).as_text())
    assert jax.eval_shape(count, leaf).counts.dtype == np.int64
    assert jax.eval_shape(count, small).counts.dtype == np.int32
    assert jax.eval_shape(count, [small, small]).nan.dtype == np.int64


@pytest.mark.parametrize(
    "bins",
    [32, [], [0.0], [0.0, 0.0], [1, 0], [0, np.nan], [[0, 1]], [-38, 0], [0, 39]],
    ids=str,
)
def test_bins_that_are_none(bins):
    message = r"^bins must be at least two increasing .*got " + re.escape(repr(bins))
    with pytest.raises(ValueError, match=message):
        log10_histogram(jnp.ones(3), bins)


def state(shape, sharding=None):
    nu, bound = (jnp.asarray(abs(rates(shape, seed=i))) for i in (0, 1))
    nu = jnp.where(jnp.isfinite(nu), nu, 0.0)
    averages = ({"w": jax.device_put(x, sharding)} for x in (nu, nu, 1 + bound))
    return ScaleByAdamodState(jnp.asarray(10, jnp.int32), *averages)


def watch(state):
    rates = learning_rates(state, 3.0)
    counts = [log10_histogram(rate, BINS) for rate in rates]
    return counts, held_by_bound(rates)


def collectives(text):
    """The number of elements of every array that leaves a device."""
    found = re.findall(r"= (.*?) (?:all-|collective-|reduce-scatter)[\w-]*\(", text)
    shapes = re.findall(r"[a-z]\d+\[([\d,]*)\]", " ".join(found))
    return [int(np.prod([int(n) for n in s.split(",") if n])) for s in shapes]


@pytest.mark.parametrize(
    ("axis_type", "spec"),
    [
        (AxisType.Explicit, P("a", "b")),
        (AxisType.Explicit, P()),
        (AxisType.Auto, P("a")),
    ],
)
def test_only_counts_leave_a_shard(axis_type, spec):
    mesh = make_mesh(("a", "b"), axis_type)
    expected = jax.jit(watch)(state((64, 32)))
    assert expected[0][0].nan == 3
    assert 0.1 < expected[1].share["w"] < 0.9
    with jax.set_mesh(mesh):
        sharded = state((64, 32), NamedSharding(mesh, spec))
        compiled = jax.jit(watch).lower(sharded).compile()
        sizes = collectives(compiled.as_text())
        assert bool(sizes) == (spec != P() and COUNT > 1)
        # Every shard's counts, in all 14 numbers for each of the two rates.
        assert max(sizes, default=0) <= COUNT * 2 * (len(BINS) + 1)
        actual = compiled(sharded)
        assert_few_units_apart(actual, expected)  # of counts, none
        for rate in learning_rates(sharded, 3.0):
            assert rate["w"].sharding.is_equivalent_to(sharded.nu["w"].sharding, 2)


def test_the_comparisons_are_not_written():
    """On CPU not even the magnitudes, which elsewhere all edges share."""
    averages = state((512, 512))
    magnitudes = 0 if jax.default_backend() == "cpu" else 512 * 512 * 4

    def histogram(state):
        return log10_histogram(learning_rates(state, 3.0).bounded, BINS)

    memory = jax.jit(histogram).lower(averages).compile().memory_analysis()
    assert memory.argument_size_in_bytes > 2 * 512 * 512 * 4
    written = memory.output_size_in_bytes + memory.temp_size_in_bytes
    assert written < magnitudes + (2**16 if magnitudes else 4096)
