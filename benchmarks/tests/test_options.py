"""Does each program refuse options that it does not know, or cannot use?"""

import runpy
from pathlib import Path

import pytest

import benchmarks

FILES = sorted(Path(benchmarks.__file__).parent.glob("*.py"))
PROGRAMS = {x.stem: str(x) for x in FILES if '"__main__"' in x.read_text()}


@pytest.mark.parametrize(
    ("program", "words", "message"),
    [
        *((program, "--nonsense", "--nonsense") for program in PROGRAMS),
        ("gpu", "--minutes 0", "--minutes must be positive, got 0"),
        ("step_time", "--optimizers SGD", "--optimizers: ['SGD'] unknown"),
        ("step_time", "--cases width", "--cases: ['width'] unknown"),
        ("step_time", "--rounds 0", "--rounds must be at least 1, got 0"),
        ("train_step", "--models MLP", "--models: ['MLP'] unknown"),
        ("train_step", "--batch 1", "--batch must be at least 2, got 1"),
        ("whole_step", "--optimizers SGD", "--optimizers: ['SGD'] unknown"),
        ("whole_step", "--steps -1", "--steps must be at least 0, got -1"),
    ],
)
def test_nonsense_is_refused(program, words, message, monkeypatch, capsys):
    path = PROGRAMS[program]
    monkeypatch.setattr("sys.argv", [path, *words.split()])
    with pytest.raises(SystemExit) as refused:
        runpy.run_path(path, run_name="__main__")
    assert refused.value.code == 2
    # Tyro prints a frame around the message, and breaks its lines.
    said = "".join(capsys.readouterr()).replace("│", " ")
    assert message in " ".join(said.split())
