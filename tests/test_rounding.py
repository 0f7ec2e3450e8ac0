"""Is stochastic rounding unbiased, independent, and the same everywhere?"""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from helpers import BFLOAT16, COUNT, FLOAT8, make_mesh, noise, rounded_to_nearest
from optax_adamod import Float8Array, _storage, adamod, scale_by_adamod
from optax_adamod._storage import Seed


def float32(words):
    return jax.lax.bitcast_convert_type(jnp.asarray(words, jnp.uint32), jnp.float32)


def random_bits(shape, count, leaf, many=16):
    path = (jax.tree_util.DictKey(leaf),)
    words = Seed.step_words(count), Seed.leaf_word(path)
    return _storage.random_bits(shape, Seed.of(*words), many)


@jax.jit
def rounded(x):
    """By each of the values that 16 random bits can take; as the bits of bfloat16."""
    bits = jnp.arange(2**16, dtype=jnp.uint32)
    x = _storage.stochastic_round(jnp.broadcast_to(x, bits.shape), bits)
    return jax.lax.bitcast_convert_type(x, jnp.uint16)


def test_probability_of_rounding_up_is_exact():
    """Of the 2**16 random words as many round up as the lower half says."""
    for upper in (0x3F80, 0xC2F7, 0x0001, 0x8000, 0x7F7E):
        for lower in (0, 1, 0x1234, 0x8000, 0xFFFF):
            words = np.asarray(rounded(float32(upper << 16 | lower)), np.int64)
            assert set(words) <= {upper, upper + 1}
            assert np.sum(words - upper) == lower


def test_special_values_keep_their_meaning():
    largest = float(jnp.finfo(jnp.bfloat16).max)
    for x in (0.0, -0.0, 1.0, -2.5, largest, -largest, np.inf, -np.inf):
        expected = jax.lax.bitcast_convert_type(jnp.bfloat16(x), jnp.uint16)
        assert np.all(rounded(jnp.float32(x)) == expected)
    for word in (0x7FC00000, 0x7FFFFFFF, 0xFFC00000, 0xFFFFFFFF):  # what sums return
        assert np.all(np.asarray(rounded(float32(word))) & 0x7FFF > 0x7F80)
    for sign, word in ((1, 0x7F7F), (-1, 0xFF7F)):
        assert np.all(rounded(sign * jnp.finfo(jnp.float32).max) == word)


SHAPE = (512, 512)


@functools.cache
def words(many):
    """Random words of 2 leaves, 4 steps up to 64 apart and 3 averages."""
    bits = jax.jit(random_bits, static_argnums=(0, 2, 3))
    of = itertools.product((1, 2, 9, 65), (0, 1))
    return np.concatenate(jax.device_get([bits(SHAPE, *x, many) for x in of]))


@pytest.mark.parametrize("many", [16, 20])
def test_bits_are_uniform(many):
    n = words(many)[0].size
    even = (np.arange(n) + 0.5) / n
    for word in words(many):
        # Chance puts 1 of 10,000 so far from its share, by Kolmogorov and Smirnov.
        assert np.abs(np.sort(word, axis=None) / 2**many - even).max() < 2.2 / n**0.5
        for bit in range(many):
            assert abs(np.mean(word >> bit & 1) - 0.5) < 2.25 / np.sqrt(n)


@pytest.mark.parametrize("many", [16, 20])
def test_bits_are_independent(many):
    """|z| < 4.5 for all pairs of leaf, step and average, and of a coordinate's partner.

    Chance puts 1 pair of 150,000 outside; these are 13,000, each of 1e5 draws or more.
    """
    uniform = words(many).astype(np.float32)
    fields = (uniform - (2**many - 1) / 2) / (2**many / np.sqrt(12))
    flat = fields.reshape(len(fields), -1)
    z = flat @ flat.T / np.sqrt(flat.shape[1])
    assert np.abs(z[np.triu_indices(len(z), 1)]).max() < 4.5
    row, column = np.indices(SHAPE)
    partners = [(column, row)]
    for d in (1, 7, 64):
        partners += [(row ^ d, column ^ d), (row ^ d, column), (row, column ^ d)]
        partners += [(row + d, column - d), (row + d, column + d)]
        partners += [(row + d, column), (row, column + d)]
    for i, (other_row, other_column) in enumerate(partners):
        inside = np.maximum(other_row, other_column) < SHAPE[0]
        # Each pair of coordinates once.
        inside &= (other_row - row) * SHAPE[1] + other_column - column > 0
        inside &= other_column >= 0
        here = fields[:, row[inside], column[inside]]
        there = fields[:, other_row[inside], other_column[inside]]
        assert here.shape[1] > 1e5
        z = here @ there.T / np.sqrt(here.shape[1])
        assert np.abs(z).max() < 4.5, i


def test_the_mean_of_a_leaf_is_as_quiet_as_that_of_independent_coordinates():
    """At each step, and from step to step: averages add them up."""
    n, steps = 32 * 256, 4000

    def mean(count):
        return jnp.mean(random_bits((32, 256), count, 0)[2] / 2**16 - 0.5)

    means = jax.jit(lambda: jax.lax.map(mean, jnp.arange(1, steps + 1)))()
    z = np.asarray(means, np.float64) * np.sqrt(12 * n)
    assert abs(np.std(z) - 1) < 4.5 / np.sqrt(2 * steps)
    for lag in (1, 2, 3, 10, 50):
        assert abs(np.mean(z[lag:] * z[:-lag])) < 4.5 / np.sqrt(steps)


def test_bits_do_not_depend_on_how_they_are_computed():
    eager = random_bits((24, 40), 5, 2)
    for sharding in (None, NamedSharding(make_mesh(("x",)), P("x"))):
        jitted = jax.jit(lambda n: random_bits((24, 40), n, 2), out_shardings=sharding)
        chex.assert_trees_all_equal(jitted(5), eager)


@pytest.mark.parametrize(
    ("shape", "windows"),
    [
        ((2**17, 2**17), [(0, 0), (2**15, 0), (2**16, 1), (0, 2**16), (2**17 - 8, 0)]),
        ((2**34,), [(0,), (2**32 - 8,), (2**32,), (2**33,), (2**34 - 64,)]),
        ((3, 2**33), [(0, 0), (1, 0), (2, 0), (0, 2**32), (1, 2**32)]),
    ],
    ids=str,
)
def test_bits_of_huge_leaves_do_not_repeat(shape, windows):
    def window(start):
        cut = tuple(slice(a, a + 64 // 8 ** (len(shape) - 1)) for a in start)
        bits = jax.jit(lambda: random_bits(shape, 1, 0, 20)[2][cut]).lower().compile()
        # XLA computes the window alone: the whole would be gigabytes.
        assert bits.memory_analysis().temp_size_in_bytes < 2**20
        return np.asarray(bits()).ravel()

    for a, b in itertools.combinations(map(window, windows), 2):
        n = min(len(a), len(b))
        # Two words agree by chance once in a million.
        assert np.sum(a[:n] == b[:n]) <= 1


def test_steps_are_no_shifts_of_each_other():
    """An odd constant for each step would make them so: 11 of the old one's is this."""
    shift = 11 * 0xD1B54A35 % 2**32
    shape, n = (shift + 1000,), 1000

    @functools.partial(jax.jit, static_argnums=1)
    def window(count, start):
        return random_bits(shape, count, 0, 20)[2][start:][:n]

    assert np.sum(window(1011, 0) == window(1000, shift)) <= 2
    now = np.asarray(window(1000, 0))
    for lag in (1, 2, 64):  # of coordinates close by
        later = np.asarray(window(1000 + lag, 0))
        for d in range(-3, 4):
            assert np.sum(now[10:-10] == later[10 + d : n - 10 + d]) <= 2


def test_leaves_and_averages_round_by_bits_of_their_own():
    """Which do not depend on the rest of the tree, nor on groups of optax.partition."""
    gradients = dict.fromkeys("ab", jnp.full(4096, 0.7))
    up = []
    for name in ("mu", "nu", "bound"):  # one at a time, for bound depends on nu
        tx = scale_by_adamod(**{f"{name}_dtype": "bfloat16"})
        _, state = jax.jit(tx.update)(gradients, tx.init(gradients))
        for leaf in getattr(state, name).values():
            assert len(np.unique(leaf)) == 2  # the two neighbours
            up.append(np.asarray(leaf == leaf.max(), np.float64))
    for a, b in itertools.combinations(up, 2):
        assert abs(np.corrcoef(a, b)[0, 1]) < 4 / np.sqrt(4096)
    split = optax.partition({"one": tx, "two": tx}, {"a": "one", "b": "two"})
    _, apart = jax.jit(split.update)(gradients, split.init(gradients))
    for label, name in (("one", "a"), ("two", "b")):
        group = apart.inner_states[label].inner_state
        chex.assert_trees_all_equal(group.bound[name], state.bound[name])


@pytest.mark.parametrize(
    "dtypes",
    [*({k: x} for k, x in BFLOAT16.items()), {"mu_dtype": "float8"}, FLOAT8],
    ids=str,
)
@pytest.mark.usefixtures("quick_compilation")
def test_derivatives_are_those_of_float32(dtypes):
    """In the mean rounding is the identity, and so it is in derivatives."""
    first = jnp.linspace(0.5, 2, 128).reshape(1, 128)

    def derivatives(**dtypes):
        tx = adamod(1.0, b3=0.5, **dtypes)
        _, state = tx.update(first, tx.init(first))

        def updates(scale):
            return tx.update(scale * first, state)[0]

        backward = jax.grad(lambda scale: jnp.sum(updates(scale)))
        return jax.jit(lambda x: (jax.jacfwd(updates)(x), backward(x)))(-0.5)

    (exact, _), (actual, total) = derivatives(), derivatives(**dtypes)
    assert np.all(np.abs(exact) > 0.1)
    rtol = 0.3 if "float8" in dtypes.values() else 0.02
    chex.assert_trees_all_close(actual, exact, rtol=rtol)
    assert not np.array_equal(actual, exact)
    np.testing.assert_allclose(total, jnp.sum(actual), rtol=1e-4)


@pytest.mark.parametrize("dtypes", [{"bound_dtype": "bfloat16"}, FLOAT8], ids=str)
@pytest.mark.usefixtures("quick_compilation")
def test_shards_and_members_round_by_bits_of_their_own(dtypes):
    """And replicas by the same, though all have equal gradients."""
    tx = scale_by_adamod(b3=0.9, **dtypes)
    g = jnp.linspace(0.1, 1, 256).reshape(1, 256)

    def bound(g):
        return getattr(bound := tx.update(g, tx.init(g))[1].bound, "codes", bound)

    def agreement(codes, n=8):
        """How often two of some equal leaves are rounded alike."""
        members = np.asarray(codes, np.float64).reshape(n, -1)
        same = members[:, None] == members[None]
        return same[~np.eye(n, dtype=bool)].mean()

    def sharded(spec, g):
        mesh = make_mesh(("x",))
        f = jax.shard_map(bound, mesh=mesh, in_specs=spec, out_specs=spec)
        return jax.jit(f)(g)

    members = jnp.stack([g] * 8)
    assert agreement(jax.jit(jax.vmap(bound))(members)) < 0.9
    nested = jax.jit(jax.vmap(jax.vmap(bound)))(members.reshape(4, 2, 1, 256))
    assert agreement(nested) < 0.9
    replicas = sharded(P(), g)
    alone = jax.jit(bound)(g)
    chex.assert_trees_all_close(*jax.device_get((replicas, alone)), rtol=0.2)
    for copy in replicas.addressable_shards:
        np.testing.assert_array_equal(copy.data, replicas)
    if COUNT > 1:
        assert agreement(sharded(P("x"), jnp.tile(g, (COUNT, 1))), COUNT) < 0.9


def trajectory(steps, coordinates, sigma, wrap=lambda tx: tx, **settings):
    """Means over the second half: nu, bound and |update|."""
    tx = wrap(scale_by_adamod(**settings))
    shape = (coordinates // 128, 128)
    scale = jnp.exp(noise(shape, 1))

    def body(carry, step):
        state, total = carry
        g = scale * jnp.exp(sigma * jax.random.normal(jax.random.key(step), shape))
        updates, state = tx.update(g, state)
        seen = [
            x.dequantize() if isinstance(x, Float8Array) else x.astype(jnp.float32)
            for x in (state.nu, state.bound, jnp.abs(updates))
        ]
        late = step >= steps // 2
        return (state, jax.tree.map(lambda a, x: a + late * x, total, seen)), None

    start = tx.init(scale), [jnp.zeros(shape)] * 3
    run = jax.jit(lambda: jax.lax.scan(body, start, jnp.arange(steps))[0][1])
    return [np.asarray(x, np.float64) / (steps - steps // 2) for x in run()]


@pytest.mark.slow
@pytest.mark.parametrize("b3", [0.999, 0.9999])
@pytest.mark.parametrize("sigma", [0.0, 0.5], ids=["constant", "log-normal"])
def test_averages_follow_float32_for_20000_steps(sigma, b3):
    """The bound is right by itself; noise in nu raises the mean of 1 / sqrt(nu)."""
    # So many that the standard error of a mean is about 0.1 %.
    coordinates = 4_096 if b3 == 0.999 else 16_384
    wide = trajectory(20_000, coordinates, sigma, b3=b3)

    def ratios(**settings):
        """Means and scatters of nu, bound and |update| as shares of float32's."""
        narrow = trajectory(20_000, coordinates, sigma, b3=b3, **settings)
        shares = [a / b for a, b in zip(narrow, wide, strict=True)]
        print(sigma, b3, settings, *(f"{x.mean():.4f}+-{x.std():.4f}" for x in shares))
        return np.asarray([(x.mean() - 1, x.std()) for x in shares]).T

    for dtypes in ({"bound_dtype": "bfloat16"}, BFLOAT16):
        errors, scatters = ratios(**dtypes)
        assert np.all(np.abs(errors) < (0.005, 0.005, 0.01))
        assert np.all(scatters[:2] < 0.06)
    assert abs(ratios(bound_dtype="float8")[0][1]) < 0.005
    assert abs(ratios(nu_dtype="float8")[0][0]) < 0.005
    # The smallest state in which the bound's mean is right to half a percent.
    assert abs(ratios(**FLOAT8 | {"nu_dtype": "bfloat16"})[0][1]) < 0.005
    assert np.all(np.abs(ratios(**FLOAT8)[0]) < (0.005, 0.02, 0.03))
    nearest = ratios(wrap=rounded_to_nearest)[0][1]
    assert nearest < (-0.4 if b3 == 0.999 else -0.85)
