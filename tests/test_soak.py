"""Does a hundred thousand updates leave memory, traces and numbers as they were?"""

import gc
import os
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_adamod import adamod

UPDATES = 100_000
STATM = Path("/proc/self/statm")
LARGEST = np.iinfo(np.int32).max


def own_bytes():
    """Memory of this process alone: none of files, which come and go."""
    _, resident, shared, *_ = map(int, STATM.read_text().split())
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.skipif(not STATM.exists(), reason="reads its own size from /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_soak(dtype):
    """Non-finite gradients, sleeping coordinates that wake, and a count that ends."""
    dtypes = {f"{name}_dtype": dtype for name in ("mu", "nu", "bound")}
    tx = optax.apply_if_finite(adamod(1e-3, **dtypes), 1000)
    params = {"w": jnp.zeros((4, 8)), "b": jnp.zeros(8)}
    asleep = 5000  # steps that half of the coordinates sleep, and then are awake
    chex.clear_trace_counter()  # which knows functions by name

    @chex.assert_max_traces(n=1)
    def step(params, state, i):
        kick = jnp.where(i % 997 == 7, jnp.nan, jnp.where(i % 1009 == 8, jnp.inf, 1.0))

        def gradient(p):
            awake = (jnp.arange(8) % 2 == 0) | (i // asleep % 2 == 1)
            return jnp.where(awake, p - jnp.sin(i / 100.0), 0.0) * kick

        updates, state = tx.update(jax.tree.map(gradient, params), state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step, donate_argnums=(0, 1))
    start = jnp.asarray(LARGEST - UPDATES // 2, jnp.int32)
    state = optax.tree.set(tx.init(params), count=start)
    memory, arrays = [], []
    gc.collect()  # arrays of other tests
    for i in range(UPDATES):
        params, state = step(params, state, np.int32(i))
        if i % (UPDATES // 10) == 0:
            chex.assert_tree_all_finite((params, state))
            assert max(np.abs(params["w"]).max(), np.abs(params["b"]).max()) < 2
            arrays.append(len(jax.live_arrays()))
            memory.append(own_bytes())
    chex.assert_tree_all_finite((params, state))
    bad = sum(i % 997 == 7 or i % 1009 == 8 for i in range(UPDATES))
    assert bad > 190
    assert (state.total_notfinite, state.notfinite_count) == (bad, 0)
    assert optax.tree.get(state, "count") == LARGEST
    # Flat once the first tenth has warmed up.
    assert len(set(arrays[1:])) == 1
    # A hundred bytes an update; the system may add a few pages of 2 MB by itself.
    assert memory[-1] - memory[1] < 100 * 0.8 * UPDATES
