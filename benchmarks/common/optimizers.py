"""The optimizers that are compared, and the update that is measured."""

import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from optax_adamod import adamod, round_updates_stochastically

ADAM = "Adam"
ADAMOD = "AdaMod"
ADAMOD_BFLOAT16 = "AdaMod, bfloat16 mu and bound"
ADAMOD_ALL_BFLOAT16 = "AdaMod, bfloat16 averages"
ADAMOD_BFLOAT16_WEIGHTS = "AdaMod, bfloat16 weights"
ADAMOD_6_BYTES = "AdaMod, bfloat16 weights and averages"
ADAMOD_FLOAT8 = "AdaMod, 8 bits"
ADAMOD_7_BYTES = "AdaMod, 7 bytes"
ADAM_FLOAT8 = "Adam, 8 bits"
ADAM_BFLOAT16 = "Adam, bfloat16 weights"
FLOAT8: dict[str, Any] = {
    "mu_dtype": "float8",
    "nu_dtype": "float8",
    "bound_dtype": "float8",
}
BFLOAT16: dict[str, Any] = dict.fromkeys(FLOAT8, "bfloat16")

OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    ADAM: lambda: optax.adam(1e-3),
    ADAMOD: lambda: adamod(1e-3),
    ADAMOD_BFLOAT16: lambda: adamod(1e-3, mu_dtype="bfloat16", bound_dtype="bfloat16"),
    ADAMOD_ALL_BFLOAT16: lambda: adamod(1e-3, **BFLOAT16),
    ADAMOD_FLOAT8: lambda: adamod(1e-3, **FLOAT8),
    ADAMOD_7_BYTES: lambda: optax.chain(
        adamod(1e-3, **FLOAT8), round_updates_stochastically()
    ),
    ADAM_FLOAT8: lambda: adamod(1e-3, b3=0, mu_dtype="float8", nu_dtype="float8"),
    ADAM_BFLOAT16: lambda: optax.adam(1e-3),
    ADAMOD_BFLOAT16_WEIGHTS: lambda: adamod(1e-3),
    ADAMOD_6_BYTES: lambda: optax.chain(
        adamod(1e-3, **BFLOAT16), round_updates_stochastically()
    ),
    "AMSGrad": lambda: optax.amsgrad(1e-3),
    "AdaBelief": lambda: optax.adabelief(1e-3),
    "RAdam": lambda: optax.radam(1e-3),
    "Lion": lambda: optax.lion(1e-3),
}

# Of flashoptim_jax, with the bits of a weight; 16 are those of bfloat16 alone.
FLASH = {"flashoptim_jax AdamW": 24, "flashoptim_jax AdamW, 16 bits": None}
BFLOAT16_WEIGHTS = (
    ADAMOD_7_BYTES, ADAM_BFLOAT16, ADAMOD_BFLOAT16_WEIGHTS, ADAMOD_6_BYTES, *FLASH
)  # fmt: skip

Step = Callable[[Any, Any, Any], tuple[Any, ...]]


class Updates(NamedTuple):
    """What makes a state of parameters, and the whole update."""

    init: Callable[[Any], Any]
    step: Step


def updates_of(optimizer: str) -> Updates:
    """Returns how an optimizer of this file updates."""
    if optimizer in FLASH:
        from flashoptim_jax import flash_adamw  # pyright: ignore[reportMissingImports]

        flash = flash_adamw(1e-3, master_weight_bits=FLASH[optimizer])
        return Updates(flash.init, flash.step)
    tx = OPTIMIZERS[optimizer]()
    return Updates(tx.init, step(tx))


def missing() -> set[str]:
    """Returns those whose package is not installed."""
    return set() if importlib.util.find_spec("flashoptim_jax") else set(FLASH)


def weights_dtype(optimizer: str) -> DTypeLike:
    """Returns the dtype of the parameters and gradients that an optimizer is for."""
    return jnp.bfloat16 if optimizer in BFLOAT16_WEIGHTS else jnp.float32


def step(tx: optax.GradientTransformation) -> Step:
    """Returns the whole update, to be jitted with :data:`DONATED` donated.

    What is donated has the order of the outputs: in any other XLA copies.
    """

    def update(params, opt_state, gradients):
        updates, opt_state = tx.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return update


DONATED = (0, 1)


def step_in_place(tx: optax.GradientTransformation) -> Step:
    """Returns the update that leaves its updates where the gradients were.

    To be jitted with its three arguments donated. On TPUs a kernel may write the update
    over the gradient, as in training, where gradients are no arguments: those that are,
    and stay, would be copied first.
    """

    def update(params, opt_state, gradients):
        updates, opt_state = tx.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, updates

    return update
