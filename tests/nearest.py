"""The rounding that the library does not do, to be compared with its own."""

from typing import Any

import jax
import jax.numpy as jnp
import optax


def rounded_to_nearest(
    tx: optax.GradientTransformation,
) -> optax.GradientTransformation:
    """Keeps a transformation's float32 averages in bfloat16, rounded to nearest."""

    def cast(state: optax.OptState, old: Any, new: Any) -> optax.OptState:
        return jax.tree.map(lambda x: x.astype(new) if x.dtype == old else x, state)

    def init_fn(params: optax.Params) -> optax.OptState:
        return cast(tx.init(params), jnp.float32, jnp.bfloat16)

    def update_fn(updates, state, params=None):
        state = cast(state, jnp.bfloat16, jnp.float32)
        updates, state = tx.update(updates, state, params)
        return updates, cast(state, jnp.float32, jnp.bfloat16)

    return optax.GradientTransformation(init_fn, update_fn)
