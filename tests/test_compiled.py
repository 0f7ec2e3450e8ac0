"""What do the compilers of GPUs and TPU pods make of one update?

They come with the group ``compiled`` and need no accelerator: ``pytest -m compiled``.
"""

import concurrent.futures
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TARGETS = {
    "H100": "jax_cuda13_plugin",
    "v5e 16x16": "libtpu",
    "v5p 8x8x8": "libtpu",
    "2 slices of v5e 16x16": "libtpu",
}
BFLOAT16, FLOAT8 = "AdaMod, bfloat16 mu and bound", "AdaMod, 8 bits"
NARROW = (FLOAT8, "AdaMod, 7 bytes", "Adam, 8 bits")
# One leaf of each model's shape, and trees of many.
SHAPES = ("8192 x 8192", "50257 x 768", "16 x 2048 x 8192")
TREES = (*SHAPES, "mixed", "16 equal leaves")
LLAMA = ("Llama 3.2 1B",)
pytestmark = pytest.mark.compiled


def compiled(target, trees, folder):
    """Returns the facts: rows by tree and optimizer, of explicit mesh axes on pods."""
    if importlib.util.find_spec(TARGETS[target]) is None:
        pytest.skip(f"{TARGETS[target]} is not installed; the group 'compiled' has it")
    # In a process of its own, since libtpu is configured by the environment.
    subprocess.run(
        [
            sys.executable, "-m", "benchmarks.compiled", "--axes", "explicit",
            "--targets", target, "--trees", *trees, "--output", folder,
        ],
        check=True, cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    tables = json.loads((folder / "compiled.json").read_text())["tables"]
    assert len(tables) == len(trees)
    return {
        name: {row["optimizer"]: row for row in rows}
        for title, rows in tables.items()
        for name in trees
        if f", {name}:" in title
    }


@pytest.fixture(scope="module")
def compilations(request, tmp_path_factory):
    """What the chosen tests need, at once as far as there are cores: each takes one."""
    tests = [x for x in request.session.items if x.path == request.path]
    wanted = {
        ("H100", LLAMA) if "llama" in x.fixturenames
        else (x.callspec.params["target"], TREES)
        for x in tests
    }  # fmt: skip
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {
            key: pool.submit(compiled, *key, tmp_path_factory.mktemp("compiled"))
            for key in wanted
        }


@pytest.fixture(scope="module", params=TARGETS)
def target(request, compilations):
    return request.param, compilations[request.param, TREES].result()


@pytest.fixture(scope="module")
def llama(compilations):
    """146 leaves on an H100."""
    return compilations["H100", LLAMA].result()[LLAMA[0]]


def test_no_collectives_and_no_temporaries(target):
    """In 8 bits on an H100 the indices of rows and groups, as for all leaves alike."""
    name, facts = target
    for tree, found in facts.items():
        for optimizer, row in found.items():
            assert row["collectives"] == 0, (tree, optimizer)
            narrow = optimizer in NARROW
            if narrow and tree == "16 equal leaves" and name != "H100":
                continue  # long vectors, which a TPU pads to tiles of several rows
            # Room for a few scalars; the smallest leaf has 2,048 parameters.
            room = 0.05 if narrow else (0.001 if tree in SHAPES else 0.05)
            assert row["live"] <= room, (tree, optimizer)
            if name == "H100":
                assert row["temporaries"] <= room, (tree, optimizer)


def test_kernels(target):
    """No more than Adam's; in 8 bits one for the averages, and one for the update."""
    name, facts = target
    for tree in TREES:
        adam, adamod, bfloat16 = (facts[tree][x] for x in ("Adam", "AdaMod", BFLOAT16))
        assert 0 < adamod["kernels"] <= adam["kernels"] <= adam["leaves"]
        assert 0 < bfloat16["kernels"] <= adam["kernels"]
        if name == "H100":  # where a scalar takes a kernel too
            scalars = "of scalars and indices"
            assert adamod[scalars] <= adam[scalars]
    for optimizer in NARROW:
        for tree in SHAPES:
            assert facts[tree][optimizer]["kernels"] == 2, (tree, optimizer)
        # Some of whose leaves are vectors, in float32, and one has heads of 128.
        assert facts["mixed"][optimizer]["a leaf"] <= 3
    for optimizer in facts["mixed"].keys() - set(NARROW):
        # Equal leaves have one kernel to compile, with random bits of their own too.
        row, mixed = (facts[x][optimizer] for x in ("16 equal leaves", "mixed"))
        assert (optimizer, row["kernels"], row["kinds"]) == (optimizer, 16, 1)
        assert (optimizer, mixed["kinds"]) == (optimizer, mixed["kernels"])


def test_146_leaves_in_8_bits_have_little_to_compile(llama):
    """By the number of kernels, and how many of them differ."""
    for optimizer in NARROW:
        row = llama[optimizer]
        every = row["kernels"] + row["of scalars and indices"]
        assert every <= 2.3 * row["leaves"]
        assert row["kinds"] <= 16
        assert row["temporaries"] <= 0.05
    assert llama[BFLOAT16]["kernels"] == llama["Adam"]["kernels"] == 146


def test_bytes_a_parameter(target):
    _, facts = target
    matrix = facts["8192 x 8192"]
    for name, state, read, written in (
        ("Adam", 8, 16, 12),
        ("AdaMod", 12, 20, 16),
        (BFLOAT16, 8, 16, 12),
        (FLOAT8, 3.023, 11.023, 7.023),
        ("AdaMod, 7 bytes", 3.023, 7.023, 5.023),
        ("Adam, 8 bits", 2.016, 10.016, 6.016),
    ):
        # A TPU keeps the count in 512 bytes, which is 0.004 of a parameter's here,
        # and pads exponents, by 0.03.
        room = 0.04 if name in NARROW else 0.01
        assert [matrix[name][x] for x in ("state", "in", "out")] == pytest.approx(
            [state, read, written], abs=room
        )
