"""Does the experiment on short runs compare what it says?"""

import re

import pytest

from experiments import run_length
from experiments.common.training import Run


def test_the_difference_is_of_the_same_seed_rate_and_length():
    history = {}
    for number, name in enumerate(("Adam", "AdaMod")):
        for rate in (1e-3, 1e-2):
            for seed in range(2):
                rows = [
                    {"step": step, "loss": 10 * number * rate + seed + 1 / step}
                    for step in range(10, 60, 10)
                ]
                history[Run(name, None, rate, seed)] = rows
    lines = run_length.behind(history, {0.5: 50}).splitlines()
    # 10 times the rate, whatever the seed.
    assert lines[-1] == (
        "| 0.5 | 50 | 0.010 (0.010 to 0.010) | 0.100 (0.100 to 0.100) |"
    )


@pytest.mark.slow
def test_the_command_writes_a_row_for_each_length(tmp_path, monkeypatch):
    monkeypatch.setattr(run_length, "B3", 0.5)
    options = run_length.Options(rates=(1e-2,), seeds=1, output=tmp_path / "output")
    run_length.main(options)
    text = (tmp_path / "output" / "run_length.md").read_text()
    table = text[text.index("AdaMod's loss less") :]
    assert len(re.findall(r"^\| [\d.]+ \|", table, re.MULTILINE)) == len(
        run_length.HORIZONS
    )
