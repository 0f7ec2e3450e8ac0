"""Times an update, and the watching of its learning rates, on 25 million parameters.

python -m benchmarks.diagnostics
"""

import collections
import statistics
import time

import jax
import numpy as np
import tyro

from optax_adamod import held_by_bound, learning_rates, log10_histogram, scale_by_adamod

SHAPE = 5000, 5000
BINS = np.linspace(-4, 4, 33)
ROUNDS = 9


def main() -> None:
    """Prints the median times, taken in turns."""
    gradients = jax.random.normal(jax.random.key(0), SHAPE)
    tx = scale_by_adamod(b3=0.99)
    update = jax.jit(tx.update, donate_argnums=(0, 1))
    _, state = tx.update(gradients, tx.init(gradients))

    @jax.jit
    def histogram(state):
        return log10_histogram(learning_rates(state).bounded, BINS)

    @jax.jit
    def held(state):
        return held_by_bound(learning_rates(state))

    times: dict[str, list[float]] = collections.defaultdict(list)
    for _ in range(ROUNDS + 1):
        start = time.perf_counter()
        gradients, state = jax.block_until_ready(update(gradients, state))
        times["update"].append(time.perf_counter() - start)
        for name, f in (("histogram", histogram), ("held by bound", held)):
            start = time.perf_counter()
            jax.block_until_ready(f(state))
            times[name].append(time.perf_counter() - start)
    device = jax.devices()[0].device_kind
    print(f"{gradients.size:,} parameters, {device}, JAX {jax.__version__}")
    for name, (_, *measured) in times.items():
        print(f"{name:14} {1e3 * statistics.median(measured):7.1f} ms")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
