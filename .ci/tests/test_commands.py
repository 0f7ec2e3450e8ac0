"""Does the script find the commands of a page, and what is wrong with them?"""

import importlib.util
from pathlib import Path

import pytest

PATH = Path(__file__).parents[1] / "commands.py"
PAGE = """
Install it (`pip install -e '.[test]'`), then run `python -m
examples.quickstart`; `python` alone, `tx.init` and [links](x.md) are none.

```sh
pip install . && pytest tests -k release   # a comment
python -m examples.pod_training \\
    --steps 3
```

```python
python = "pip install nothing"
```
"""


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("commands", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_commands_of_a_page(script):
    assert list(script.commands(PAGE)) == [
        "pip install .",
        "pytest tests -k release",
        "python -m examples.pod_training --steps 3",
        "pip install -e '.[test]'",
        "python -m examples.quickstart",
    ]


@pytest.mark.parametrize(
    "command",
    [
        "python -m examples.quickstart",
        "python -m examples.flax_linen --steps 3",
        "pip install -e '.[test,experiments]' --group dev",
        ".ci/run docs",
        "pytest .ci -k nothing_is_wrong",
        "pytest -m clients clients/test_optimistix.py",
    ],
)
def test_nothing_is_wrong(script, command):
    assert script.problem(command) is None


@pytest.mark.parametrize(
    ("command", "wrong"),
    [
        ("python -m examples.quickstart --steps 3", "quickstart takes no options"),
        ("python -m examples.flax_linen --stops 3", "no such options: --stops"),
        ("python -m examples.flux", "there is no examples/flux.py"),
        ("pip install -e '.[dev]'", "pip cannot install ['dev']"),
        ("pip install -e . --group test", "pip cannot install ['test']"),
        (".ci/run dogs", "no such part"),
        ("pytest tests/test_nothing.py", "file or directory not found"),
        ("pytest -m clients clients/test_nothing.py", "there is no ['clients/test_n"),
        ("make", "an unknown program"),
    ],
)
def test_what_is_wrong(script, command, wrong):
    assert wrong in script.problem(command)


def test_what_fails_is_named(script, capfd):
    assert script.run_short(["true", "echo words && exit 3"]) == [
        "echo words && exit 3: exit code 3"
    ]
    assert "words" in capfd.readouterr().out


def test_what_is_long_is_not_run(script):
    assert script.is_long("python -m experiments.densenet --size full")
    assert not script.is_long("python -m examples.quickstart")
