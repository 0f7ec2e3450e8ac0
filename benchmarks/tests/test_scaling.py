"""Do predictions for many chips follow from the bytes of compiled programs?"""

import pytest

from benchmarks import scaling
from benchmarks.common import optimizers


def test_tables_are_written(tmp_path):
    scaling.main(tmp_path)
    assert "## v5p, Llama 3 405B" in (tmp_path / "scaling.md").read_text()


def test_times_and_memory_follow_the_bytes(monkeypatch):
    figures = dict.fromkeys(optimizers.OPTIMIZERS, (36.0, 20.0))
    monkeypatch.setattr(scaling, "compiled_bytes", lambda chip: figures)
    rows = scaling.table(scaling.CHIPS["v5p"], 8 * 10**9)
    assert [row["chips"] for row in rows] == [8, 64, 256, 1024, 4096, 8960]
    row = rows[0]  # one chip has too little memory
    assert row["AdaMod: GB a chip"] == pytest.approx(20.0)
    seconds = 36e9 / 2765e9
    assert row["AdaMod: ms"] == pytest.approx(1e3 * seconds)
    training = 6 * 8e9 * 2**22 / (0.4 * 459e12 * 8)
    share = seconds / (seconds + training)
    assert row["AdaMod: % of a step"] == pytest.approx(100 * share)


@pytest.mark.parametrize(("chip", "moved"), [("H100", 21.07), ("v5p", 26.05)])
def test_8_bits_count_what_lies_between_two_kernels(chip, moved):
    """The codes are read again on a GPU; a TPU writes and reads the update."""
    bytes_moved = scaling.compiled_bytes(scaling.CHIPS[chip])
    adam, _ = bytes_moved[optimizers.ADAM]
    assert adam == pytest.approx(28, abs=0.05)
    found, _ = bytes_moved[optimizers.ADAMOD_FLOAT8]
    assert found == pytest.approx(moved, abs=0.1)
