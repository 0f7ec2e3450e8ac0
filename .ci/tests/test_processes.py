"""How many processes do the tests start?"""

import types

import jax
import pytest

import conftest

EVERYDAY = "not clients and not compiled and not slow"


class Gpu:
    def __init__(self, memory):
        self.memory = memory

    def memory_stats(self):
        return {"bytes_limit": self.memory}


@pytest.mark.parametrize(
    ("platform", "memory", "expression", "processes"),
    [
        ("cpu", None, EVERYDAY, 4),
        ("gpu", 60e9, EVERYDAY, 15),  # three quarters of an H100's 80
        ("gpu", 12e9, EVERYDAY, 3),
        ("gpu", 2e9, EVERYDAY, 1),
        ("gpu", 60e9, "slow", 0),
        ("tpu", None, EVERYDAY, 0),
    ],
)
def test_processes_share_a_gpus_memory(
    monkeypatch, platform, memory, expression, processes
):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    monkeypatch.setattr(jax, "local_devices", lambda: [Gpu(memory)])
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    config = types.SimpleNamespace(option=types.SimpleNamespace(markexpr=expression))
    assert conftest.pytest_xdist_auto_num_workers(config) == processes
