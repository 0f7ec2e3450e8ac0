"""Does the library keep to the public names of JAX and Optax?"""

import re
import sys
from pathlib import Path


def test_public_names_of_jax_and_optax_alone():
    for path in (Path(__file__).parent.parent / "optax_adamod").glob("*.py"):
        text = path.read_text()
        assert not re.search(r"\b(jax|optax)\._src\b", text)
        imports = re.findall(r"^(?:import|from) (\w+)", text, re.MULTILINE)
        allowed = {"jax", "optax", "numpy", "optax_adamod"} | sys.stdlib_module_names
        assert set(imports) <= allowed
