"""What other people's libraries need: their warnings and ranks are not ours."""

import os

import jax
import pytest

os.environ["KERAS_BACKEND"] = "jax"
os.environ["NETKET_ENABLE_X64"] = "0"  # its import would set 64 bits for all others


def pytest_configure(config):
    """Leaves the warnings of other libraries warnings."""
    config.addinivalue_line("filterwarnings", "default")
    config.addinivalue_line("filterwarnings", "error:::optax_adamod")


@pytest.fixture(autouse=True)
def promotion_of_ranks():
    """Lets arrays of different ranks be added, as users may."""
    with jax.numpy_rank_promotion("allow"):
        yield
