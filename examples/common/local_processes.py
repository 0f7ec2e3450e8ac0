"""Several JAX processes on this machine, as on several hosts of a pod."""

import multiprocessing.connection
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any

import jax

HEARTBEAT = 20  # seconds of silence after which a process counts as dead
ENDING = 60  # seconds that the others have to notice it, and to end


def run(count: int, devices: int, target: Callable[..., None], *args: Any) -> None:
    """Runs ``target(*args)`` in ``count`` processes of one JAX program.

    Args:
      count: Number of processes.
      devices: Simulated devices of each, on CPU.
      target: A function of a module, since new interpreters import it.
      *args: Its arguments, which can be pickled.

    Raises:
      RuntimeError: If processes failed; says which and how, as they ended.
    """
    context = multiprocessing.get_context("spawn")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    processes = [
        context.Process(
            target=_start,
            args=(address, count, i, devices, target, args),
            name=f"process {i}",
        )
        for i in range(count)
    ]
    for process in processes:
        process.start()

    def pass_on(*_: Any) -> None:
        # As schedulers do, to all of them.
        for process in processes:
            if process.is_alive():
                process.terminate()

    previous = signal.signal(signal.SIGTERM, pass_on)
    try:
        failures = _watch(processes)
    finally:
        signal.signal(signal.SIGTERM, previous)
        for process in processes:
            process.kill()
            process.join()
    if failures:
        raise RuntimeError("; ".join(failures))


def _watch(processes: list[Any]) -> list[str]:
    """Waits for the processes; returns what became of those that failed."""
    failures: list[str] = []
    running = list(processes)
    while running:
        sentinels = [process.sentinel for process in running]
        ready = multiprocessing.connection.wait(sentinels, ENDING if failures else None)
        ended = [process for process in running if process.sentinel in ready]
        if not ended:
            names = ", ".join(process.name for process in running)
            return [*failures, f"{names} had not ended {ENDING} s later"]
        for process in ended:
            running.remove(process)
            process.join()
            code = process.exitcode
            if code:
                how = f"was killed by {signal.Signals(-code).name}" if code < 0 else ""
                failures.append(f"{process.name} {how or f'ended with code {code}'}")
                print(f"{failures[-1]} (pid {process.pid})", file=sys.stderr)
    return failures


def _start(
    address: str, count: int, i: int, devices: int, target: Callable[..., None], args
) -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # A step that fails with a dead process is to be the last one: what is sent ahead
    # of the next would reach the others in the middle of this one.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    jax.distributed.initialize(
        address,
        count,
        i,
        cluster_detection_method="deactivate",
        heartbeat_timeout_seconds=HEARTBEAT,
        shutdown_timeout_seconds=HEARTBEAT,
    )
    target(*args)
