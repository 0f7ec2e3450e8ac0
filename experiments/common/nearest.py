"""Averages in 8 bits that round to nearest, which the library's do not."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_adamod import Float8Array


def float8_to_nearest(
    tx: optax.GradientTransformation,
) -> optax.GradientTransformation:
    """Keeps averages in the library's 8 bits where it would, rounded to nearest."""

    def narrow(path: Any, x: jax.Array) -> Any:
        if x.dtype != jnp.float32 or not x.ndim or x.shape[-1] % 128:
            return x
        return Float8Array.quantize(x, signed="mu" in jax.tree_util.keystr(path))

    def widen(x: Any) -> jax.Array:
        return x.dequantize() if isinstance(x, Float8Array) else x

    def init_fn(params: optax.Params) -> optax.OptState:
        return jax.tree.map_with_path(narrow, tx.init(params))

    def update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
    ) -> tuple[optax.Updates, optax.OptState]:
        wide = jax.tree.map(widen, state, is_leaf=lambda x: isinstance(x, Float8Array))
        updates, wide = tx.update(updates, wide, params)
        return updates, jax.tree.map_with_path(narrow, wide)

    return optax.GradientTransformation(init_fn, update_fn)
