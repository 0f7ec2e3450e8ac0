"""Do imports run one way, and is each file in the house of its purpose?"""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAY_IMPORT = {
    "optax_adamod": set(),
    "tests": {"optax_adamod"},
    "examples": {"optax_adamod"},
    "experiments": {"optax_adamod", "examples"},
    "benchmarks": {"optax_adamod", "examples"},
    "clients": {"optax_adamod"},
}
# What each floor of the experiments may import of them.
FLOORS = {
    "programs": {"tasks", "models", "data", "common"},
    "tasks": {"tasks", "models", "data", "common"},
    "models": {"models", "data", "common"},
    "data": {"data", "common"},
    "common": {"common"},
}


def modules(path):
    """The modules that a file imports; those relative to it begin with a dot."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield from (f"{base}.{name.name}" for name in node.names)


def test_imports_run_one_way():
    for room, others in MAY_IMPORT.items():
        for path in (ROOT / room).rglob("*.py"):
            found = {name.split(".")[0] for name in modules(path)}
            assert found & {*MAY_IMPORT, ""} <= {room, *others}, path


def programs():
    """The programs, by the names of their modules."""
    paths = [path for room in MAY_IMPORT for path in (ROOT / room).glob("*.py")]
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path
        for path in paths
        if '"__main__"' in path.read_text() or path.name == "quickstart.py"
    }


def imported(path):
    """What a file imports, and the packages and modules around it."""
    for name in modules(path):
        yield name
        yield name.rpartition(".")[0]


def test_no_module_imports_a_program():
    """So no program imports another, nor does any module between them."""
    assert len(programs()) > 15
    for room in MAY_IMPORT:
        for path in (ROOT / room).rglob("*.py"):
            if "tests" not in path.relative_to(ROOT).parts:
                assert not set(imported(path)) & {*programs()}, path


def floor_of(name):
    """The floor of a module of the experiments: a folder, or the programs' on top."""
    _, *folders = name.split(".")
    return folders[0] if folders and folders[0] in FLOORS else "programs"


def test_experiments_stand_on_floors():
    for path in (ROOT / "experiments").rglob("*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        found = {floor_of(x) for x in modules(path) if x.startswith("experiments.")}
        if ".tests." not in name:
            assert found <= FLOORS[floor_of(name)], path


@pytest.mark.parametrize("room", ["benchmarks", "examples", "experiments"])
def test_at_the_top_are_programs_alone(room):
    found = set((ROOT / room).glob("*.py"))
    assert found - {*programs().values()} == {ROOT / room / "__init__.py"}


def test_contributors_find_every_module():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for path in (ROOT / "optax_adamod").glob("_[a-z]*.py"):
        assert f"`{path.name}`" in text, path


def test_the_library_keeps_to_public_names_of_jax_and_optax():
    for path in (ROOT / "optax_adamod").glob("*.py"):
        assert not re.search(r"\b(jax|optax)\._src\b", path.read_text())
        imports = {name.split(".")[0] for name in modules(path)}
        allowed = {"jax", "optax", "numpy", "optax_adamod"} | sys.stdlib_module_names
        assert imports <= allowed, path
