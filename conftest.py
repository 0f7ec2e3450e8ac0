"""What the tests of every room share: eight CPU devices, strict ranks, fixtures."""

import os
import tempfile

import hypothesis
import pytest

# Processes share a GPU, of which each would take three quarters.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax

jax.config.update("jax_num_cpu_devices", int(os.getenv("JAX_NUM_CPU_DEVICES", "8")))
jax.config.update("jax_numpy_rank_promotion", "raise")

# What several tests compile, each process compiles once.
compiled = tempfile.TemporaryDirectory()
jax.config.update("jax_compilation_cache_dir", compiled.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

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


GPU_SHARE = 4e9  # bytes for each process; 14 on an H100 had 5.7e9


def pytest_xdist_auto_num_workers(config):
    """As many processes as cores and a GPU's memory allow; a TPU belongs to one."""
    everyday = config.option.markexpr == "not clients and not compiled and not slow"
    platform, cores = jax.default_backend(), os.cpu_count() or 1
    if not everyday or platform not in ("cpu", "gpu"):
        return 0
    if platform == "cpu":
        return min(cores, 4)
    memory = jax.local_devices()[0].memory_stats()["bytes_limit"]
    return max(1, min(cores, int(memory / GPU_SHARE)))


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
