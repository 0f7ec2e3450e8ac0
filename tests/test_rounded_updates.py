"""Do parameters in bfloat16 follow their updates in the mean, and others exactly?"""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from optax_adamod import _storage, adamod, round_updates_stochastically


def followed(steps, rate, *last):
    """4,096 parameters that walk away from random numbers by ``rate`` each step."""
    tx = optax.chain(optax.scale(-rate), *last)
    params = jax.random.normal(jax.random.key(0), (32, 128)).astype(jnp.bfloat16)

    def body(carry, _):
        params, state = carry
        updates, state = tx.update(jnp.ones((32, 128)), state, params)
        return (optax.apply_updates(params, updates), state), None

    run = jax.jit(lambda p: jax.lax.scan(body, (p, tx.init(p)), None, steps)[0][0])
    end = run(params)
    assert end.dtype == jnp.bfloat16
    return np.asarray(end, np.float64) - np.asarray(params, np.float64)


@pytest.mark.parametrize(
    ("steps", "rate", "chance", "frozen"),
    [
        (400, 1e-4, 2e-3, 0.01),
        # Each walk has a scatter of about 0.009, so the mean of 4,096 has 0.00014.
        pytest.param(20_000, 1e-6, 6e-4, 1e-4, marks=pytest.mark.slow),
    ],
)
def test_parameters_follow_small_updates(steps, rate, chance, frozen):
    moved = followed(steps, rate, round_updates_stochastically())
    assert abs(moved.mean() + steps * rate) < chance
    assert abs(followed(steps, rate).mean()) < frozen


def test_other_parameters_get_the_very_updates():
    """And leaves that are no arrays, as the functions of an Equinox model, None."""
    tx = round_updates_stochastically()
    params = {"w": jnp.ones(8), "c": jnp.ones(3, jnp.complex64), "b": jnp.ones(2)}
    others = {"activation": jax.nn.relu, "name": "w", "bfloat16": jnp.bfloat16(1)}
    updates = {**params, "b": None, **dict.fromkeys(others), "bfloat16": jnp.zeros([])}
    params |= others
    new, state = tx.update(updates, tx.init(params), params)
    assert new.pop("bfloat16") == updates.pop("bfloat16")
    chex.assert_trees_all_equal(new, updates)
    assert state.count == 1


def test_sums_are_unbiased_whatever_the_magnitude():
    """Of updates from 1e-6 to 1e3 of the parameter; 65,536 coordinates each.

    Where the sum is not within a factor of two of the parameter, the update is rounded
    itself, by 2**-8 at most.
    """
    tx = round_updates_stochastically()
    update = jax.jit(tx.update)
    for p, power in itertools.product((1.0, 1.4921875, -0.8125), range(-6, 4)):
        params = jnp.full((256, 256), p, jnp.bfloat16)
        for u in (1.37 * 10.0**power, -0.71 * 10.0**power):
            with jax.numpy_dtype_promotion("strict"):
                updates, _ = update(jnp.full(params.shape, u), tx.init(params), params)
            assert updates.dtype == jnp.bfloat16
            new = np.asarray(optax.apply_updates(params, updates), np.float64)
            # The spacing of the larger of the sum and the parameter.
            spacing = 2.0**-7 * max(abs(p + u), abs(p))
            near = 0.5 <= (p + u) / p <= 2
            rounded = 0 if near else 2.0**-8 * abs(u)
            spread = spacing / 2 / np.sqrt(params.size)
            assert abs(new.mean() - (p + u)) < 4 * spread + rounded
            assert np.abs(new - (p + u)).max() < spacing + rounded


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: optax.apply_if_finite(tx, 3),
        lambda tx: optax.MultiSteps(tx, 1, should_skip_update_fn=optax.skip_not_finite),
    ],
    ids=["apply_if_finite", "MultiSteps"],
)
@pytest.mark.usefixtures("quick_compilation")
def test_flax_and_conditionals(wrap):
    """Both branches of a cond must have updates of one dtype."""
    tx = wrap(optax.chain(adamod(1e-4, b3=0.5), round_updates_stochastically()))
    model = nnx.Linear(8, 128, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    before = model.kernel[...].astype(jnp.float32)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    gradients = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
    step = nnx.jit(lambda model, optimizer: optimizer.update(model, gradients))
    for _ in range(20):
        step(model, optimizer)
    assert model.kernel[...].dtype == jnp.bfloat16
    moved = (model.kernel[...].astype(jnp.float32) - before).mean()
    assert abs(moved / -2e-3 - 1) < 0.2


def test_bad_input():
    tx = round_updates_stochastically()
    params = {"w": jnp.ones((2, 3), jnp.bfloat16), "v": jnp.ones(3), "f": jax.nn.relu}
    state = tx.init(params)
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(params, state)
    message = r"updates\['w'\] has shape \(1, 3\), and its parameter \(2, 3\)"
    with pytest.raises(ValueError, match=message):
        tx.update({"w": jnp.ones((1, 3)), "v": None, "f": None}, state, params)
    with pytest.raises(ValueError, match=r"updates\['v'\] has shape \(1,\), and its"):
        tx.update({"w": None, "v": jnp.ones(1), "f": None}, state, params)
    with pytest.raises(TypeError, match=r"updates\['f'\], and params\['f'\] is .*None"):
        tx.update({"w": None, "v": None, "f": jnp.ones(1)}, state, params)
    for dtype in ("float16", "float8_e4m3fn"):
        params = {"v": jnp.ones(3), "w": jnp.ones(3, dtype)}
        for call in (tx.init, lambda p: tx.update(p, tx.init({}), p)):
            message = rf"params\['w'\] is {dtype}; .*bfloat16"
            with pytest.raises(TypeError, match=message):
                call(params)


def test_parameters_and_averages_round_by_bits_of_their_own():
    tx, p = round_updates_stochastically(), jnp.ones(2**14, jnp.bfloat16)
    # Half of the spacing, so that a sum is rounded up with the highest bit.
    updates, _ = tx.update(jnp.full(p.shape, 2.0**-8), tx.init(p), p)
    seed = _storage.Seed.of(_storage.Seed.step_words(1), _storage.Seed.leaf_word(()))
    of_mu = _storage.random_bits(p.shape, seed, 16)[0]
    assert 0.45 < jnp.mean((updates > 0) == (of_mu >= 2**15)) < 0.55
