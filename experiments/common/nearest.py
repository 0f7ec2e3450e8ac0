"""Averages that round to nearest between steps, which the library's do not."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_adamod import Float8Array


def rounded_to_nearest(
    tx: optax.GradientTransformation,
    narrow: Callable[[jax.Array, str], Any],
    widen: Callable[[Any], jax.Array],
) -> optax.GradientTransformation:
    """Keeps a transformation's float32 averages in another form between steps.

    Args:
      tx: The transformation.
      narrow: Returns the form of an array that belongs to a field, such as ``"mu"``.
      widen: Returns the array of a form.
    """

    def store(state: optax.OptState) -> optax.OptState:
        return jax.tree.map_with_path(
            lambda path, x: (
                narrow(x, "mu" if "mu" in jax.tree_util.keystr(path) else "")
                if x.dtype == jnp.float32
                else x
            ),
            state,
        )

    def load(state: optax.OptState) -> optax.OptState:
        return jax.tree.map(widen, state, is_leaf=lambda x: isinstance(x, Float8Array))

    def init_fn(params: optax.Params) -> optax.OptState:
        return store(tx.init(params))

    def update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
    ) -> tuple[optax.Updates, optax.OptState]:
        updates, state = tx.update(updates, load(state), params)
        return updates, store(state)

    return optax.GradientTransformation(init_fn, update_fn)


def bfloat16_to_nearest(
    tx: optax.GradientTransformation,
) -> optax.GradientTransformation:
    """Keeps averages in bfloat16, rounded to nearest."""

    def widen(x: jax.Array) -> jax.Array:
        return x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x

    return rounded_to_nearest(tx, lambda x, _: x.astype(jnp.bfloat16), widen)


def float8_to_nearest(
    tx: optax.GradientTransformation,
) -> optax.GradientTransformation:
    """Keeps averages in the library's 8 bits where it would, rounded to nearest."""

    def narrow(x: jax.Array, field: str) -> Any:
        if not x.ndim or x.shape[-1] % 128:
            return x
        return Float8Array.quantize(x, signed=field == "mu")

    def widen(x: Any) -> jax.Array:
        return x.dequantize() if isinstance(x, Float8Array) else x

    return rounded_to_nearest(tx, narrow, widen)
