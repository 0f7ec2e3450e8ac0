"""Does a run survive what kills processes and fills disks? With real ones."""

import contextlib
import csv
import dataclasses
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import chex
import jax
import numpy as np
import pytest

from examples import pod_training
from examples.common.pod_checkpoints import Checkpoints

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
PROGRAM = (sys.executable, "-m", "examples.pod_training")
SMALL = ("--depth", "1", "--width", "8")
HANGS = 3600  # seconds after which a run hangs, on however slow a machine


@dataclasses.dataclass
class Run:
    """A run of the example in processes of its own."""

    process: subprocess.Popen
    copy: subprocess.Popen  # of what it prints, to the log
    log: Path
    folder: Path

    def text(self):
        return self.log.read_text()

    def wait_for(self, condition):
        """Waits until ``condition()``, or the run has ended."""
        end = time.monotonic() + HANGS
        while not (found := condition()) and self.process.poll() is None:
            assert time.monotonic() < end, self.text()
            time.sleep(0.01)
        return found

    def wait_for_step(self):
        """The step after which the run begins, once it does."""
        found = self.wait_for(lambda: re.search(r", after step (\d+)", self.text()))
        assert found, self.text()
        return int(found[1])

    def saved(self):
        """The steps of which there are finished checkpoints."""
        folder = self.folder / "checkpoints"
        names = os.listdir(folder) if folder.exists() else []
        return sorted(int(name) for name in names if name.isdigit())

    def ends(self, code=0):
        try:
            assert self.process.wait(HANGS) == code, self.text()
        finally:
            self.process.kill()
        self.copy.wait()
        return self.text()

    def rows(self):
        with (self.folder / "metrics.csv").open(newline="") as file:
            return list(csv.DictReader(file))


@pytest.fixture
def start(tmp_path, tmp_path_factory):
    """Starts runs, and ends what is left of them."""
    cache = tmp_path_factory.getbasetemp() / "compiled"
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    runs = []

    def run(folder, *options):
        log = tmp_path / f"{len(runs)}.log"
        command = [*PROGRAM, *SMALL, "--output", folder, *options]
        with log.open("w") as file:  # through a pipe, which no quota limits
            copy = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=file)
        with copy.stdin:
            process = subprocess.Popen(
                list(map(str, command)),
                stdout=copy.stdin,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=environment,
                start_new_session=True,
            )
        runs.append((process, copy))
        return Run(process, copy, log, Path(folder))

    yield run
    for process, copy in runs:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        copy.wait()


def restored(folder):
    """The newest checkpoint's step, and all its arrays."""
    options = pod_training.Options(depth=1, width=8)
    _, like = pod_training.abstract_state(options, pod_training.make_mesh(options.fsdp))
    checkpoints = Checkpoints(folder / "checkpoints")
    step, state = checkpoints.restore(like)
    checkpoints.close()
    return step, jax.device_get(state)


def test_twenty_sigkills_change_no_bit(start, tmp_path):
    options = ("--save-every", 10, "--steps")
    rng = np.random.default_rng(0)
    begun = []
    for kill in range(20):
        run = start(tmp_path / "killed", *options, 100_000)  # more than any can reach
        if kill % 4 == 3:  # while it starts, or a little later
            time.sleep(rng.uniform(0, 8))
        else:
            begun.append(run.wait_for_step())
            target = begun[-1] + 10 * rng.integers(1, 3)
            run.wait_for(lambda r=run, t=target: r.saved() and r.saved()[-1] >= t)
            time.sleep(rng.uniform(0, 0.5))
        assert run.process.poll() is None, run.text()
        run.process.kill()
        run.process.wait()
        saved = run.saved()
        if kill % 4 != 3:
            assert saved[-1] >= begun[-1] + 10
    steps = saved[-1] + 15
    last = start(tmp_path / "killed", *options, steps)
    assert last.wait_for_step() == saved[-1]
    last.ends()
    whole = start(tmp_path / "whole", "--save-every", steps, "--steps", steps)
    whole.ends()
    assert begun == sorted(set(begun))
    assert begun[-1] >= 10 * 14
    assert last.rows() == whole.rows()
    chex.assert_trees_all_equal(restored(last.folder), restored(whole.folder))


def children(pid):
    """The processes of JAX that a run has started, in their order."""
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [
        int(child)
        for child in text.split()
        if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text()
    ]


@pytest.mark.skipif(not Path("/proc").exists(), reason="finds processes in /proc")
def test_one_of_four_processes_killed(start, tmp_path):
    options = ("--local-processes", 4, "--save-every", 10, "--steps")
    run = start(tmp_path / "run", *options, 100_000)  # more than it can reach
    assert run.wait_for(lambda: len(run.saved()) > 1)
    os.kill(children(run.process.pid)[2], signal.SIGKILL)
    text = run.ends(code=1)
    # The last line, when nobody is left to write between its words.
    error = text[text.rindex("error: process") :]
    ends = dict(
        re.findall(r"process (\d) (was killed by \w+|ended with code \d+)", error)
    )
    assert ends.pop("2") == "was killed by SIGKILL"
    assert set(ends) == {"0", "1", "3"}
    # Those that could say why have. The others were aborted by JAX's heartbeat, or by
    # Gloo in the midst of another collective of the same step.
    for process, end in ends.items():
        assert end in ("was killed by SIGABRT", "ended with code 1")
        if end == "ended with code 1":
            assert f"process {process} of 4 cannot go on" in text
    saved = run.saved()[-1]
    again = start(tmp_path / "run", *options, saved + 5)
    assert again.wait_for_step() == saved
    again.ends()
    assert [int(row["step"]) for row in again.rows()] == list(range(1, saved + 6))
    assert again.saved()[-1] == saved + 5


@pytest.mark.parametrize("processes", [1, 4])
def test_sigterm_saves_and_ends_well(start, tmp_path, processes):
    options = ("--local-processes", 4) if processes == 4 else ()
    run = start(tmp_path / "run", "--steps", 100_000, "--save-every", 10, *options)
    assert run.wait_for(run.saved)
    run.process.terminate()
    text = run.ends()
    step = int(re.search(r"preempted: saving step (\d+)", text)[1])
    assert run.saved()[-1] == step
    assert len(run.rows()) == step
    again = start(tmp_path / "run", "--steps", step + 1)
    assert again.wait_for_step() == step  # from one process, even if four had saved
    again.ends()


@pytest.fixture(params=["tmpfs", "quota"])
def small_disk(request, tmp_path):
    """A folder, what keeps a process from writing there, and what lets it again."""
    folder = tmp_path / "small"
    folder.mkdir()
    if request.param == "quota":
        if not hasattr(resource, "prlimit"):
            pytest.skip("only Linux limits the files of another process")

        def limit(pid, size=2**13):
            limits = (size, resource.RLIM_INFINITY)
            resource.prlimit(pid, resource.RLIMIT_FSIZE, limits)

        yield folder, limit, lambda pid: limit(pid, resource.RLIM_INFINITY)
        return
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", folder],
        capture_output=True,
        text=True,
        check=False,
    )
    if mount.returncode:
        pytest.skip(f"may not mount a small disk ({mount.stderr.strip()}); see [quota]")
    ballast = folder / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    os.truncate(ballast, ballast.stat().st_size - 2**16)
    yield folder, lambda pid: None, lambda pid: ballast.unlink()
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_full_disk_is_no_end(start, tmp_path, small_disk):
    folder, limit, lift = small_disk
    options = ("--save-every", 20, "--steps")
    run = start(folder / "run", *options, 100_000)  # more than it can reach
    limit(run.process.pid)
    warning = r"step (\d+) was not saved: .*(File too large|No space left).* goes on"
    assert run.wait_for(lambda: len(re.findall(warning, run.text())) > 1), run.text()
    assert not run.saved()
    lift(run.process.pid)
    assert run.wait_for(run.saved)
    run.process.terminate()
    text = run.ends()
    last = run.saved()[-1]
    # A save that follows may fail by what is left of the one before.
    lost = [int(step) for step in re.findall(r"step (\d+) was not saved", text)]
    assert lost[:2] == [20, 40]
    assert lost == list(range(20, lost[-1] + 20, 20))  # and none after those
    assert lost[-1] < last
    whole = start(tmp_path / "whole", "--save-every", last, "--steps", last)
    whole.ends()
    assert run.rows() == whole.rows()
    chex.assert_trees_all_equal(restored(run.folder), restored(whole.folder))


def test_truncated_checkpoint_is_named_and_the_one_before_used(start, tmp_path):
    options = ("--save-every", 10, "--steps")
    run = start(tmp_path / "run", *options, 20)
    run.ends()
    for file in (tmp_path / "run" / "checkpoints" / "20").rglob("d/*"):
        os.truncate(file, file.stat().st_size // 2)
    again = start(tmp_path / "run", *options, 30, "--local-processes", 2)
    text = again.ends()
    assert re.search(r"UserWarning: the checkpoint .*/20 cannot be read", text)
    assert again.wait_for_step() == 10
    assert [int(row["step"]) for row in again.rows()] == list(range(1, 31))
