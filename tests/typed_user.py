# pyright: strict, reportMissingTypeStubs=false
"""What a user writes; `.ci/run wheel` checks its types, but for those of Optax."""

import jax
import jax.numpy as jnp
import optax

import optax_adamod
from optax_adamod import adamod, adamodw, scale_by_adamod

params = jax.random.normal(jax.random.key(0), (3,))
schedule: optax.Schedule = optax.constant_schedule(0.1)
tx: optax.GradientTransformation = adamod(learning_rate=0.1, b3=0.99)
decayed: optax.GradientTransformationExtraArgs = adamodw(
    schedule,
    weight_decay=1e-2,
    mask=None,
    mu_dtype="bfloat16",
    bound_dtype=jnp.bfloat16,
)
chain: optax.GradientTransformation = optax.chain(
    scale_by_adamod(bound_learning_rate=schedule),
    optax.scale_by_learning_rate(schedule),
)
state = tx.init(params)
updates, state = tx.update(params, state, params)
params = optax.apply_updates(params, updates)
rates = optax_adamod.learning_rates(state, 0.1)
counts: jax.Array = optax_adamod.log10_histogram(rates.bounded, [-2, -1, 0]).counts
held: optax_adamod.HeldByBound = optax_adamod.held_by_bound(rates)
