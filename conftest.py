"""What the tests of every room share: eight CPU devices, strict ranks, fixtures."""

import os

import hypothesis
import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

# Compilation makes the first example of a property slow; seeds are fixed.
hypothesis.settings.register_profile("default", deadline=None, derandomize=True)
hypothesis.settings.load_profile("default")


def pytest_ignore_collect(collection_path):
    """Leaves programs alone: to look for examples in them would be to run them."""
    module = collection_path.suffix == ".py" and collection_path.name != "__init__.py"
    folder = collection_path.parent.name
    if module and folder != "optax_adamod" and collection_path.name[:5] != "test_":
        return True
    return None


def pytest_xdist_auto_num_workers(config):
    """One process for each core, where they share neither accelerator nor deadline."""
    everyday = config.option.markexpr == "not clients and not compiled and not slow"
    if not everyday or jax.default_backend() != "cpu":
        return 0
    return min(os.cpu_count() or 1, 4)


@pytest.fixture(autouse=True)
def matplotlib_without_a_screen(monkeypatch):
    """No test opens a window."""
    monkeypatch.setenv("MPLBACKEND", "Agg")


@pytest.fixture
def x64():
    """64-bit mode for one test; the others run without it, as users do."""
    if jax.default_backend() == "tpu":
        pytest.skip("TPUs have no complex128 and emulate float64")
    with jax.enable_x64(True):
        yield


@pytest.fixture
def quick_compilation():
    """For whole experiments of a few steps, most of whose time is compilation."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def eight_devices():
    """What tests of sharding need; a machine may have fewer accelerators."""
    if jax.default_backend() != "cpu" and jax.device_count() != 8:
        pytest.skip(f"needs 8 devices, and JAX has {jax.device_count()} here")
    assert jax.device_count() == 8
