"""Is AdaMod inside every wrapper of Optax what its equations are there?"""

import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from optax_adamod import adamod

STEPS = 6
HYPERPARAMETERS = dict(b1=0.9, b2=0.99, b3=0.8, eps=1e-8)
DTYPES = {
    # How far the updates of a step may be off, relative to their norm.
    "float32": 2e-5,
    "bfloat16": 0.01,
    "float8": 0.15,
}
PARAMS, TARGET = (
    {"w": np.random.default_rng(seed).normal(size=(256, 256)).astype(np.float32)}
    for seed in (0, 1)
)

# Of each wrapper of a transformation, one way to use it, for a transformation and what
# makes one of a learning rate.
WRAPPERS = {
    "MultiSteps": lambda tx, _: optax.MultiSteps(tx, 2).gradient_transformation(),
    "apply_if_finite": lambda tx, _: optax.apply_if_finite(tx, 2),
    "chain": lambda tx, _: optax.chain(optax.clip_by_global_norm(1.0), tx),
    "conditionally_mask": lambda tx, _: optax.conditionally_mask(
        tx, lambda t: t % 2 == 0
    ),
    "contrib.mechanize": lambda tx, _: optax.contrib.mechanize(tx, s_init=0.1),
    "contrib.sam": lambda tx, _: optax.contrib.sam(tx, optax.sgd(0.01)),
    "contrib.sam, adversary": lambda tx, _: optax.contrib.sam(optax.sgd(0.1), tx),
    "contrib.schedule_free": lambda tx, _: optax.contrib.schedule_free(tx, 0.02),
    "contrib.split_real_and_imaginary": (
        lambda tx, _: optax.contrib.split_real_and_imaginary(tx)
    ),
    "flatten": lambda tx, _: optax.flatten(tx),
    "inject_hyperparams": lambda _, make: optax.inject_hyperparams(make)(0.02),
    "lookahead": lambda tx, _: optax.lookahead(tx, 3, 0.5),
    "masked": lambda tx, _: optax.masked(tx, {"w": True}),
    "partition": lambda tx, _: optax.partition({0: tx}, {"w": 0}),
}
LEFT_OUT = {
    "conditionally_transform": "does what conditionally_mask does",
    "contrib.galore": "updates projections; see test_types.py",
    "contrib.scale_by_galore": "is in galore",
    "named_chain": "is chain",
    "selective_transform": "is masked",
    "with_extra_args_support": "hands all through",
    "inject_stateful_hyperparams": "is deprecated, and warns",
    "multi_transform": "is partition",
    "lbfgs": "takes a line search",
    "monitor": "takes measures, which do not change the updates",
    "contrib.sophia": "takes an estimate of the Hessian",
}


def _takes_a_transformation(function):
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return False
    return any("GradientTransformation" in str(p.annotation) for p in parameters)


def in_this_optax():
    """The names of all wrappers that the installed Optax has."""
    for module, prefix in ((optax, ""), (optax.contrib, "contrib.")):
        for name, function in vars(module).items():
            if name[0] != "_" and _takes_a_transformation(function):
                yield prefix + name


def test_every_wrapper_is_in_the_table():
    named = {name.split(",")[0] for name in WRAPPERS} | LEFT_OUT.keys()
    assert {"chain", "MultiSteps", "masked"} <= set(in_this_optax()) <= named


def by_the_equations(learning_rate):
    """AdaMod in float32, as plainly as Optax's own transformations are written."""
    b1, b2, b3, eps = (HYPERPARAMETERS[name] for name in ("b1", "b2", "b3", "eps"))

    def init_fn(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return jnp.int32(0), zeros, zeros, zeros

    def eta_of(v, t):
        return learning_rate / (jnp.sqrt(v / (1 - b2**t)) + eps)

    def update_fn(updates, state, params=None):
        t, m, v, s = state[0] + 1, *state[1:]
        m = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, m, updates)
        v = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g**2, v, updates)
        s = jax.tree.map(lambda s, v: b3 * s + (1 - b3) * eta_of(v, t), s, v)

        def update(m, v, s):
            return -jnp.minimum(eta_of(v, t), s) * m / (1 - b1**t)

        return jax.tree.map(update, m, v, s), (t, m, v, s)

    return optax.GradientTransformation(init_fn, update_fn)


def all_updates(name, make):
    """Returns the updates of all steps, and the first and last state."""
    tx = WRAPPERS[name](make(0.02), make)
    params, target = PARAMS, TARGET
    if name == "contrib.split_real_and_imaginary":
        params, target = ({"w": p["w"] + 0.5j * p["w"].T} for p in (params, target))
    if name == "lookahead":
        params = optax.LookaheadParams.init_synced(params)

    @jax.jit
    def step(params, state):
        traces.append(name)
        fast = params.fast if name == "lookahead" else params
        gradients = jax.tree.map(jnp.subtract, fast, target)
        updates, state = tx.update(gradients, state, params)
        return updates, optax.apply_updates(params, updates), state

    traces, found, first = [], [], tx.init(params)
    state, params = first, jax.tree.map(jnp.asarray, params)
    for _ in range(STEPS):
        updates, params, state = step(params, state)
        found.append(np.concatenate([np.ravel(x) for x in jax.tree.leaves(updates)]))
    assert traces == [name]
    return np.stack(found), first, state


@pytest.fixture
def exact_products():
    """Accelerators multiply matrices in fewer bits than float32 has."""
    with jax.default_matmul_precision("float32"):
        yield


def names():
    here = set(in_this_optax())
    return [name for name in WRAPPERS if name.split(",")[0] in here]


@pytest.mark.parametrize(
    "dtype",
    # Plain arrays take the way through a wrapper that 8 bits take, so not every day.
    [pytest.param(x, marks=pytest.mark.slow if x != "float8" else ()) for x in DTYPES],
)
@pytest.mark.parametrize("name", names())
@pytest.mark.usefixtures("quick_compilation", "exact_products")
def test_updates_are_those_of_the_equations(name, dtype):
    settings = HYPERPARAMETERS | {f"{x}_dtype": dtype for x in ("mu", "nu", "bound")}
    actual, first, last = all_updates(name, lambda rate: adamod(rate, **settings))
    expected = all_updates(name, by_the_equations)[0]
    error, size = (np.linalg.norm(x, axis=1) for x in (actual - expected, expected))
    assert np.all(error <= DTYPES[dtype] * size)
    chex.assert_trees_all_equal_shapes_and_dtypes(first, last)
    kinds = {str(x.dtype) for x in jax.tree.leaves(first)}
    assert {"float8": "uint8"}.get(dtype, dtype) in kinds
