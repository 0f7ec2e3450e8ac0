"""Times what importing optax_adamod adds to importing optax.

python -m benchmarks.import_time

In processes of their own, without the garbage collector: a full collection of what JAX
and Optax have made takes longer, and happens to strike here or elsewhere.
"""

import argparse
import statistics
import subprocess
import sys

ROUNDS = 15
CODE = """
import gc, time, optax
gc.disable()
start = time.perf_counter()
import optax_adamod
print(time.perf_counter() - start)
"""


def main() -> None:
    """Prints median and quartiles."""
    times = [
        1e3
        * float(
            subprocess.run(
                [sys.executable, "-c", CODE], capture_output=True, check=True
            ).stdout
        )
        for _ in range(ROUNDS)
    ]
    low, median, high = statistics.quantiles(times, n=4)
    print(f"importing optax_adamod adds {median:.1f} ms ({low:.1f} to {high:.1f})")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    main()
