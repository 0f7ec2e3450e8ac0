"""Is stochastic rounding unbiased, independent, and the same everywhere?"""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from helpers import (
    COUNT,
    assert_equal_but_for_few_roundings,
    make_mesh,
    rounded_to_nearest,
)
from optax_adamod import _storage, adamod, scale_by_adamod

BFLOAT16 = {f"{name}_dtype": "bfloat16" for name in ("mu", "nu", "bound")}


def float32(words):
    return jax.lax.bitcast_convert_type(jnp.asarray(words, jnp.uint32), jnp.float32)


def random_bits(shape, count, leaf, many=16):
    path = (jax.tree_util.DictKey(leaf),)
    seed = _storage.Seed.of(_storage.Seed.of_step(count), _storage.Seed.of_leaf(path))
    return _storage.random_bits(shape, seed, many)


def all_bits():
    """Every one of the 2**16 values that 16 random bits can take."""
    return jnp.arange(2**16, dtype=jnp.uint32)


@pytest.mark.parametrize("upper", [0x3F80, 0xC2F7, 0x0001, 0x8000, 0x7F7E])
def test_probability_of_rounding_up_is_exact(upper):
    """Of the 2**16 random words as many round up as the lower half says."""
    for lower in (0, 1, 0x1234, 0x8000, 0xFFFF):
        x = jnp.broadcast_to(float32(upper << 16 | lower), (2**16,))
        rounded = _storage.stochastic_round(x, all_bits())
        words = np.asarray(jax.lax.bitcast_convert_type(rounded, jnp.uint16), np.int64)
        assert set(words) <= {upper, upper + 1}
        assert np.sum(words - upper) == lower


@pytest.mark.parametrize("which", [0, 1, 2], ids=["mu", "nu", "bound"])
def test_mean_error_is_zero(which):
    """1,000 values between two neighbours, 32,768 coordinates each."""
    values, samples = 1000, 32_768
    lower = np.linspace(0, 2**16, values, endpoint=False).astype(np.uint32)

    @jax.jit
    def count(lower):
        x = jnp.broadcast_to(float32(0x3F800000 | lower)[:, None], (values, samples))
        # Chance puts 1 mean in 16,000 outside; at this step, none of these.
        bits = random_bits((values, samples), 5, 0)[which]
        rounded = _storage.stochastic_round(x, bits)
        up = rounded == 1 + 2.0**-7
        return up.sum(axis=1), jnp.all(up | (rounded == 1))

    ups, nothing_else = count(lower)
    assert nothing_else
    p = lower / 2**16
    error = np.asarray(ups) / samples - p
    assert np.all(np.abs(error) <= 4 * np.sqrt(p * (1 - p) / samples))


SHAPE = (512, 512)
PARTNERS = {
    "xor of both": lambda d, row, column: (row ^ d, column ^ d),
    "xor of rows": lambda d, row, column: (row ^ d, column),
    "xor of columns": lambda d, row, column: (row, column ^ d),
    "the same sum": lambda d, row, column: (row + d, column - d),
    "the same difference": lambda d, row, column: (row + d, column + d),
    "rows below": lambda d, row, column: (row + d, column),
    "columns beside": lambda d, row, column: (row, column + d),
    "transposed": lambda d, row, column: (column, row),
    "itself": lambda d, row, column: (row, column),
}


@pytest.fixture(scope="module", params=[16, 20], ids=["bfloat16", "8 bits"])
def fields(request):
    """Standardised bits of 2 leaves, 4 steps up to 64 apart and 3 averages."""
    steps, leaves, many = (1, 2, 9, 65), (0, 1), request.param
    bits = jax.jit(random_bits, static_argnums=(0, 2, 3))
    words = [bits(SHAPE, *x, many) for x in itertools.product(steps, leaves)]
    uniform = np.concatenate(jax.device_get(words)).astype(np.float32)
    return (uniform - (2**many - 1) / 2) / (2**many / np.sqrt(12))


@pytest.mark.parametrize("partners", PARTNERS)
def test_bits_are_independent(fields, partners):
    """|z| < 4.5 for all pairs of leaf, step and average, and of a coordinate's partner.

    Chance puts 1 pair of 150,000 outside; these are 13,000, each of 1e5 draws or more.
    """
    single = partners in ("itself", "transposed")
    for d in (0,) if single else (1, 7, 64):
        row, column = np.indices(SHAPE)
        other_row, other_column = PARTNERS[partners](d, row, column)
        inside = (
            (other_row < SHAPE[0]) & (other_column < SHAPE[1]) & (other_column >= 0)
        )
        if partners != "itself":  # each pair of coordinates once
            forward = (other_row - row) * SHAPE[1] + other_column - column > 0
            inside &= forward
        here = fields[:, row[inside], column[inside]]
        there = fields[:, other_row[inside], other_column[inside]]
        assert here.shape[1] > 1e5
        z = here @ there.T / np.sqrt(here.shape[1])
        if partners == "itself":
            z = z[np.triu_indices(len(z), 1)]
        assert np.abs(z).max() < 4.5


def test_bits_are_uniform(fields):
    n = fields[0].size
    assert np.abs(fields.mean(axis=(1, 2))).max() < 4 / np.sqrt(n)
    for many in (16, 20):
        for word in random_bits(SHAPE, 1, 0, many):
            assert np.max(word) < 2**many
            for bit in range(many):
                assert abs(np.mean(np.asarray(word) >> bit & 1) - 0.5) < 2 / np.sqrt(n)


def test_the_mean_of_a_leaf_is_as_quiet_as_that_of_independent_coordinates():
    """Averages of a constant in bfloat16, whose rounding is all that moves them."""
    shape, steps, decay = (32, 256), 4000, 0.98

    def body(noise, count):
        # What rounding adds to an average, in units of the spacing.
        up = random_bits(shape, count, 0)[2].astype(jnp.float32) / 2**16
        noise = decay * noise + (up - 0.5)
        return noise, noise.mean()

    _, means = jax.jit(
        lambda: jax.lax.scan(body, jnp.zeros(shape), jnp.arange(1, steps + 1))
    )()
    expected = np.sqrt(1 / 12 / (1 - decay**2) / np.prod(shape))
    # 38 means, 100 steps apart and so nearly independent: known to 11 %.
    assert 0.5 < np.std(means[200::100]) / expected < 1.5


def test_leaves_and_averages_round_by_bits_of_their_own():
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


def test_derivatives_are_those_of_float32():
    """In the mean rounding is the identity, and so it is in derivatives."""
    first = jnp.linspace(0.5, 2, 64)

    def derivative(**dtypes):
        tx = adamod(1.0, b3=0.5, **dtypes)
        _, state = tx.update(first, tx.init(first))
        return jax.jacfwd(lambda scale: tx.update(scale * first, state)[0])(-0.5)

    exact = derivative()
    assert np.all(np.abs(exact) > 0.1)
    for name, dtype in BFLOAT16.items():
        rounded = derivative(**{name: dtype})
        chex.assert_trees_all_close(rounded, exact, rtol=0.02)
        assert not np.array_equal(rounded, exact)


def test_special_values_keep_their_meaning():
    largest = float(jnp.finfo(jnp.bfloat16).max)
    exact = [0.0, -0.0, 1.0, -2.5, largest, -largest, np.inf, -np.inf]
    for x in exact:
        rounded = _storage.stochastic_round(jnp.full(2**16, x), all_bits())
        words = jax.lax.bitcast_convert_type(rounded, jnp.uint16)
        expected = jax.lax.bitcast_convert_type(jnp.bfloat16(x), jnp.uint16)
        assert np.all(words == expected)
    for word in (0x7FC00000, 0x7FFFFFFF, 0xFFC00000, 0xFFFFFFFF):  # what sums return
        x = jnp.broadcast_to(float32(word), (2**16,))
        assert np.all(jnp.isnan(_storage.stochastic_round(x, all_bits())))
    x = jnp.full(2**16, jnp.finfo(jnp.float32).max)
    for sign in (1, -1):
        rounded = _storage.stochastic_round(sign * x, all_bits())
        assert np.all(rounded == jnp.bfloat16(sign * largest))


def test_bits_do_not_depend_on_how_they_are_computed():
    shape = (24, 40)
    eager = random_bits(shape, 5, 2)
    jitted = jax.jit(lambda count: random_bits(shape, count, 2))(5)
    chex.assert_trees_all_equal(jitted, eager)
    mesh = make_mesh(("x",))
    sharded = jax.jit(
        lambda count: random_bits(shape, count, 2),
        out_shardings=NamedSharding(mesh, P("x")),
    )(5)
    chex.assert_trees_all_equal(sharded, eager)


@pytest.mark.parametrize(
    ("shape", "windows"),
    [
        ((2**17, 2**17), [(0, 0), (2**15, 0), (2**16, 1), (0, 2**16), (2**17 - 8, 0)]),
        ((2**34, 4), [(0, 0), (2**32 - 8, 0), (2**33, 0), (2**34 - 8, 0)]),
        ((2**34,), [(0,), (2**32 - 8,), (2**32,), (2**33,), (2**34 - 64,)]),
        ((3, 2**33), [(0, 0), (1, 0), (2, 0), (0, 2**32), (1, 2**32), (2, 2**32)]),
    ],
    ids=str,
)
def test_bits_of_huge_leaves_do_not_repeat(shape, windows):
    def window(start):
        sizes = [min(8 if len(shape) == 2 else 64, n) for n in shape]
        stops = [min(a + b, n) for a, b, n in zip(start, sizes, shape, strict=True)]
        cut = tuple(map(slice, start, stops))
        # XLA computes the window alone: the whole would be gigabytes.
        compiled = (
            jax.jit(lambda: random_bits(shape, 1, 0, 20)[2][cut]).lower().compile()
        )
        assert compiled.memory_analysis().temp_size_in_bytes < 2**20
        return np.asarray(compiled()).ravel()

    seen = [window(start) for start in windows]
    for a, b in itertools.combinations(seen, 2):
        n = min(len(a), len(b))
        # Two words agree by chance once in a million.
        assert np.sum(a[:n] == b[:n]) <= 1


def test_steps_are_no_shifts_of_each_other():
    """An odd constant for each step would make them so: 11 of the old one's is this."""
    shift = 11 * 0xD1B54A35 % 2**32
    shape, n = (shift + 1000,), 1000

    def window(count, start):
        bits = jax.jit(lambda: random_bits(shape, count, 0, 20)[2][start:][:n])
        return np.asarray(bits())

    assert np.sum(window(1011, 0) == window(1000, shift)) <= 2
    for lag in (1, 2, 64):  # of coordinates close by
        now, later = window(1000, 0), window(1000 + lag, 0)
        for d in range(-3, 4):
            assert np.sum(now[10:-10] == later[10 + d : n - 10 + d]) <= 2


def trajectory(gradients_of, steps, coordinates, wrap=lambda tx: tx, **settings):
    """Returns the last state and the mean |update| of the last tenth of the steps."""
    tx = wrap(scale_by_adamod(**settings))

    def body(carry, step):
        state, total = carry
        updates, state = tx.update(gradients_of(step), state)
        late = step >= steps - steps // 10
        return (state, total + late * jnp.abs(updates)), None

    @jax.jit
    def run():
        start = tx.init(jnp.zeros(coordinates)), jnp.zeros(coordinates)
        (state, total), _ = jax.lax.scan(body, start, jnp.arange(steps))
        return state, total / (steps // 10)

    return run()


@pytest.mark.slow
@pytest.mark.parametrize("b3", [0.999, 0.9999])
def test_averages_follow_float32_for_20000_steps(b3):
    coordinates, steps = 2048, 20_000
    scale = jnp.exp(jax.random.normal(jax.random.key(0), (coordinates,)))

    def gradients_of(step):
        key = jax.random.fold_in(jax.random.key(1), step)
        return scale * (0.3 + jax.random.normal(key, (coordinates,)))

    settings = dict(
        gradients_of=gradients_of, steps=steps, coordinates=coordinates, b3=b3
    )
    wide, wide_update = trajectory(**settings)

    def ratio(narrow, name):
        """Mean and scatter of an average as a share of its float32 twin."""
        shares = np.asarray(getattr(narrow, name), np.float64) / getattr(wide, name)
        print(f"b3 {b3}, {name}: {shares.mean():.4f} +- {shares.std():.4f}")
        return shares.mean(), shares.std()

    for dtypes in ({"bound_dtype": "bfloat16"}, BFLOAT16):
        narrow, update = trajectory(**settings, **dtypes)
        for name in ("bound", "nu"):
            mean, scatter = ratio(narrow, name)
            assert abs(mean - 1) < 0.005
            assert scatter < 0.06
        assert abs(update.mean() / wide_update.mean() - 1) < 0.01
    nearest, _ = trajectory(**settings, wrap=rounded_to_nearest)
    assert ratio(nearest, "bound")[0] < (0.5 if b3 == 0.999 else 0.1)


def test_half_precision_parameters_do_not_stall():
    """To nearest, mu would stop where 0.1 (g - mu) is half a unit in its last place."""
    gradients = jnp.full(4096, 1.5, jnp.bfloat16)
    tx = scale_by_adamod()
    state = tx.init(gradients)
    update = jax.jit(tx.update)
    for _ in range(150):
        _, state = update(gradients, state)
    assert state.mu.dtype == jnp.bfloat16
    assert abs(state.mu.astype(jnp.float32).mean() / 1.5 - 1) < 1e-3


def train(params):
    """The updates and the state after four steps with noise as gradients."""
    tx = adamod(0.1, **BFLOAT16)
    state, update = tx.init(params), jax.jit(tx.update)
    for key in jax.random.split(jax.random.key(0), 4):
        noise = jax.random.normal(key, (8, 16))
        gradients = jax.tree.map(
            lambda p, n=noise: jax.device_put(n, p.sharding), params
        )
        updates, state = update(gradients, state)
    return updates, state


@pytest.fixture(scope="module")
def trained():
    params = {"w": jnp.ones((8, 16)), "v": jnp.ones((8, 16))}
    return params, train(params)


@pytest.mark.parametrize(
    ("axis_type", "spec"),
    [
        (AxisType.Explicit, P("x")),
        (AxisType.Explicit, P("x", "y")),
        (AxisType.Explicit, P(None, ("x", "y"))),
        (AxisType.Auto, P("x", "y")),
    ],
    ids=str,
)
def test_sharded_updates_are_rounded_by_the_same_bits(trained, axis_type, spec):
    params, expected = trained
    mesh = make_mesh(("x", "y"), axis_type)
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, spec)
        actual = train(jax.device_put(params, sharding))
        for leaf in jax.tree.leaves((actual[0], actual[1][0][1:])):
            assert leaf.sharding.is_equivalent_to(sharding, 2)
    assert_equal_but_for_few_roundings(actual, expected)


def agreement(codes):
    """How often members of a stack of equal averages are rounded alike."""
    members = np.asarray(codes, np.float64).reshape(len(codes), -1)
    same = members[:, None] == members[None]
    return same[~np.eye(len(members), dtype=bool)].mean()


@pytest.mark.parametrize("dtype", ["bfloat16", "float8"])
def test_shards_and_members_round_by_bits_of_their_own(dtype):
    """And replicas by the same, though all have equal gradients."""
    tx = scale_by_adamod(bound_dtype=dtype, b3=0.9)
    g = jnp.linspace(0.1, 1, 256).reshape(1, 256)

    def bound(g):
        bound = tx.update(g, tx.init(g))[1].bound
        return bound.codes if dtype == "float8" else bound

    alone = bound(g)
    members = jax.jit(jax.vmap(bound))(jnp.stack([g] * 8))
    assert agreement(members) < 0.9
    nested = jax.jit(jax.vmap(jax.vmap(bound)))(jnp.stack([jnp.stack([g] * 2)] * 4))
    assert agreement(nested.reshape(8, -1)) < 0.9
    mesh = make_mesh(("x",))

    def sharded(spec, g):
        return jax.jit(jax.shard_map(bound, mesh=mesh, in_specs=spec, out_specs=spec))(
            g
        )

    replicas = sharded(P(), g)
    chex.assert_trees_all_close(*jax.device_get((replicas, alone)), rtol=0.2)
    for copy in replicas.addressable_shards:
        np.testing.assert_array_equal(copy.data, replicas)
    shards = sharded(P("x"), jnp.tile(g, (COUNT, 1))).reshape(COUNT, -1)
    if COUNT > 1:
        assert agreement(shards) < 0.9


def test_bits_of_a_leaf_do_not_depend_on_the_rest_of_the_tree():
    """So groups of optax.partition round by bits of their own."""
    g, tx = jnp.full(4096, 0.7), scale_by_adamod(bound_dtype="bfloat16")

    def bounds(tree):
        return tx.update(tree, tx.init(tree))[1].bound

    both = bounds({"a": g, "b": g})
    chex.assert_trees_all_equal(bounds({"b": g})["b"], both["b"])
    assert agreement(jnp.stack([both["a"], both["b"]])) < 0.9
    split = optax.partition({"one": tx, "two": tx}, {"a": "one", "b": "two"})
    _, state = split.update({"a": g, "b": g}, split.init({"a": g, "b": g}))
    apart = [
        state.inner_states[label].inner_state.bound[name]
        for label, name in (("one", "a"), ("two", "b"))
    ]
    assert agreement(jnp.stack(apart)) < 0.9


def test_restart_gives_the_same_bits():
    tx = optax.chain(optax.clip(1.0), adamod(0.1, **BFLOAT16))
    gradients = [jax.random.normal(jax.random.key(i), (64,)) for i in range(6)]
    update = jax.jit(tx.update)
    state = tx.init(gradients[0])
    for g in gradients[:3]:
        _, state = update(g, state)
    saved = jax.device_get(state)
    for g in gradients[3:]:
        _, state = update(g, state)
    restored = jax.tree.map(jnp.asarray, saved)
    for g in gradients[3:]:
        _, restored = jax.jit(tx.update)(g, restored)
    chex.assert_trees_all_equal(restored, state)
    assert optax.tree.get(state, "bound").dtype == jnp.bfloat16
