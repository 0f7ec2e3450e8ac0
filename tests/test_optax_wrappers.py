"""Is AdaMod inside every wrapper of Optax what its equations are there?"""

import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from optax_adamod import adamod

STEPS = 8
HYPERPARAMETERS = dict(learning_rate=0.02, b1=0.9, b2=0.99, b3=0.8, eps=1e-8)
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
    "conditionally_mask": lambda tx, _: optax.conditionally_mask(tx, _is_even),
    "conditionally_transform": (
        lambda tx, _: optax.conditionally_transform(tx, _is_even)
    ),
    "contrib.galore": lambda tx, _: decomposed(
        optax.contrib.galore(1.0, base_optimizer=optax.chain(tx, NEGATE))
    ),
    "contrib.mechanize": lambda tx, _: optax.contrib.mechanize(tx, s_init=0.1),
    "contrib.sam": lambda tx, _: optax.contrib.sam(tx, optax.sgd(0.01)),
    "contrib.sam, adversary": lambda tx, _: optax.contrib.sam(optax.sgd(0.1), tx),
    "contrib.scale_by_galore": lambda tx, _: decomposed(
        optax.contrib.scale_by_galore(base_optimizer=tx)
    ),
    "contrib.schedule_free": lambda tx, _: optax.contrib.schedule_free(tx, 0.02),
    "contrib.split_real_and_imaginary": (
        lambda tx, _: optax.contrib.split_real_and_imaginary(tx)
    ),
    "flatten": lambda tx, _: optax.flatten(tx),
    "inject_hyperparams": lambda _, make: optax.inject_hyperparams(make)(0.02),
    "lookahead": lambda tx, _: optax.lookahead(tx, 3, 0.5),
    "masked": lambda tx, _: optax.masked(tx, {"w": True}),
    "named_chain": lambda tx, _: optax.named_chain(("adamod", tx)),
    "partition": lambda tx, _: optax.partition({0: tx}, {"w": 0}),
    "selective_transform": (
        lambda tx, _: optax.selective_transform(tx, freeze_mask={"w": False})
    ),
    "with_extra_args_support": lambda tx, _: optax.with_extra_args_support(tx),
}
LEFT_OUT = {
    "inject_stateful_hyperparams": "is deprecated, and warns",
    "multi_transform": "is partition",
    "lbfgs": "takes a line search",
    "monitor": "takes measures, which do not change the updates",
    "contrib.sophia": "takes an estimate of the Hessian",
}
NEGATE = optax.scale(-1.0)  # what galore takes is an optimizer's without its sign


def decomposed(tx):
    """GaLore after its decomposition of the first gradient, which NumPy makes.

    Neighbouring singular vectors are so ill-conditioned that two programs may find
    others, as they do on GPUs.
    """
    projector = np.linalg.svd(PARAMS["w"] - TARGET["w"])[0][:, :128]

    def init_fn(params):
        def is_galores(path, _):
            return getattr(path[-1], "tuple_name", None) == "GaLoreState"

        state = optax.tree.set(tx.init(params), projector={"w": jnp.asarray(projector)})
        return optax.tree.set(state, is_galores, count=jnp.int32(1))

    return optax.GradientTransformation(init_fn, tx.update)


def _is_even(step):
    return step % 2 == 0


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
    assert set(in_this_optax()) <= named


def by_the_equations(learning_rate=0.02):
    """AdaMod in float32, as plainly as Optax's own transformations are written."""
    b1, b2, b3, eps = (HYPERPARAMETERS[name] for name in ("b1", "b2", "b3", "eps"))

    def init_fn(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return jnp.int32(0), zeros, zeros, zeros

    def update_fn(updates, state, params=None):
        del params
        t, m, v, s = state
        t = t + 1
        m = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, m, updates)
        v = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g**2, v, updates)
        eta = jax.tree.map(
            lambda v: learning_rate / (jnp.sqrt(v / (1 - b2**t)) + eps), v
        )
        s = jax.tree.map(lambda s, eta: b3 * s + (1 - b3) * eta, s, eta)
        updates = jax.tree.map(
            lambda m, eta, s: -jnp.minimum(eta, s) * m / (1 - b1**t), m, eta, s
        )
        return updates, (t, m, v, s)

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


@functools.cache
def expected(name):
    return all_updates(name, by_the_equations)[0]


def names():
    here = set(in_this_optax())
    return [name for name in WRAPPERS if name.split(",")[0] in here]


@pytest.mark.parametrize(
    "dtype",
    # bfloat16 takes the same way through a wrapper as 8 bits, so not every day.
    [
        pytest.param(x, marks=pytest.mark.slow if x == "bfloat16" else ())
        for x in DTYPES
    ],
)
@pytest.mark.parametrize("name", names())
@pytest.mark.usefixtures("quick_compilation", "exact_products")
def test_updates_are_those_of_the_equations(name, dtype):
    dtypes = {f"{x}_dtype": dtype for x in ("mu", "nu", "bound")}
    actual, first, last = all_updates(
        name,
        lambda learning_rate: adamod(
            **{**HYPERPARAMETERS, "learning_rate": learning_rate}, **dtypes
        ),
    )
    error = np.linalg.norm(actual - expected(name), axis=1)
    size = np.linalg.norm(expected(name), axis=1)
    assert np.all(error <= DTYPES[dtype] * size)
    chex.assert_trees_all_equal_shapes_and_dtypes(first, last)
    kinds = {str(x.dtype) for x in jax.tree.leaves(first)}
    assert {"float8": "uint8", "bfloat16": "bfloat16"}.get(dtype, "float32") in kinds
