"""Do a GPU's nine minutes run part by part, whatever one of them does?"""

import json

import pytest
import tyro

from benchmarks import gpu, step_time, train_step


def test_parts_fail_alone(tmp_path, monkeypatch):
    """Those that fail or take too long are told, with what they said last."""
    commands = [
        gpu.Part(name, ("timeit", "-n", "1", "-r", "1", program), 0.5)
        for name, program in (
            ("fails", "print('one'); print('two'); raise SystemExit(3)"),
            ("waits", "import time; print('begun', flush=True); time.sleep(600)"),
            ("works", "print('fine')"),
        )
    ]
    monkeypatch.setattr(gpu, "parts", lambda options: commands)
    rows = gpu.main(gpu.Options(minutes=0.2, output=tmp_path))
    results = [row["result"] for row in rows]
    assert results == ["failed with exit code 1", "stopped at its limit", "done"]
    assert "one\ntwo" in (tmp_path / "gpu.md").read_text()
    assert "begun" in (tmp_path / "waits.txt").read_text()
    assert json.loads((tmp_path / "gpu.json").read_text())["tables"]["Parts"] == rows


def test_large_parts_name_what_exists():
    commands = {part.name: part.command for part in gpu.parts(gpu.Options())}
    for name, program, least in (("updates", step_time, 16), ("steps", train_step, 3)):
        module, *words = commands[name]
        assert module == program.__name__
        options = tyro.cli(program.Options, args=words)
        assert len(options.optimizers) >= least


@pytest.mark.slow
def test_all_parts_run_small(tmp_path):
    rows = gpu.main(gpu.Options(minutes=9, small=True, output=tmp_path))
    assert {row["part"]: row["result"] for row in rows} == dict.fromkeys(
        ("tests", "updates", "steps", "at_scale"), "done"
    )
    for name in ("updates.md", "train_step.md", "at_scale/at_scale.md"):
        assert "| AdaMod |" in (tmp_path / name).read_text()
