"""Do imports run one way, and is each file in the house of its purpose?"""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
MAY_IMPORT = {
    "optax_adamod": set(),
    "tests": {"optax_adamod"},
    "examples": {"optax_adamod"},
    "experiments": {"optax_adamod", "examples"},
    "benchmarks": {"optax_adamod", "examples"},
    "clients": {"optax_adamod"},
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


def test_no_program_imports_another():
    assert len(programs()) > 15
    for path in programs().values():
        for name in modules(path):
            assert name not in programs(), path
            assert name.rpartition(".")[0] not in programs(), path


def test_at_the_top_of_examples_are_programs_alone():
    found = set((ROOT / "examples").glob("*.py"))
    assert found - {*programs().values()} == {ROOT / "examples" / "__init__.py"}
