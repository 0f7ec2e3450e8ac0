"""Does the library keep to the public names of JAX and Optax?"""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("path", sorted((ROOT / "optax_adamod").glob("*.py")), ids=str)
def test_public_names_of_jax_and_optax_alone(path):
    assert not re.search(r"\b(jax|optax)\._src\b", path.read_text())
    imports = re.findall(r"^(?:import|from) (\w+)", path.read_text(), re.MULTILINE)
    allowed = {"jax", "optax", "numpy", "optax_adamod"} | sys.stdlib_module_names
    assert set(imports) <= allowed
