"""Do the benchmarks measure what they say? Nothing here is timed."""

import dataclasses
import importlib.util
import json
import os
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from benchmarks import (
    compiled,
    gpt2,
    gpu,
    hlo,
    llama,
    optimizers,
    scaling,
    step_time,
    timing,
    torch_optimizers,
    train_step,
    trees,
    whole_step,
)
from examples.common.resnet import ResNet
from examples.common.transformer import Transformer


@pytest.mark.parametrize(
    ("tree", "millions"),
    [
        (trees.resnet50(), 25.557),
        (trees.gpt2_small(), 124.440),
        (trees.llama3("1B"), 1235.814),
        (trees.llama3("8B"), 8030.261),
        (trees.llama3("70B"), 70553.706),
        (trees.llama3("405B"), 405853.389),
        (trees.equal_leaves(1_000_000, 160), 1.0),
        (trees.equal_matrices(2**30, 4), 1073.741824),
        (trees.equal_matrices(25_000_000, 160), 24.94464),
    ],
)
def test_trees_have_their_models_sizes(tree, millions):
    assert trees.size(tree) == pytest.approx(millions * 1e6, rel=1e-4)


def test_resnet34_has_its_size():
    model = nnx.eval_shape(lambda: ResNet((3, 4, 6, 3), 64, 3, 10, rngs=nnx.Rngs(0)))
    params = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert sum(x.size for x in params) == pytest.approx(21.3e6, rel=2e-3)


def test_resnet_halves_images():
    model = nnx.eval_shape(lambda: ResNet((1, 1), 4, 1, 3, rngs=nnx.Rngs(0)))
    images = jnp.ones((2, 8, 8, 1))
    assert nnx.eval_shape(lambda m: m(images), model).shape == (2, 3)
    features = jnp.ones((2, 8, 8, 4))
    halved = nnx.eval_shape(lambda m: m.blocks[1](m.blocks[0](features)), model)
    assert halved.shape == (2, 4, 4, 8)


def test_update_is_the_optimizers():
    tree = trees.equal_leaves(64, 2)
    update = timing.Update(optimizers.updates_of(optimizers.ADAM), tree)
    update.run(3)
    tx, params = optax.adam(1e-3), {name: np.zeros(32) for name in tree}
    state = tx.init(params)
    for _ in range(3):
        updates, state = tx.update(timing.gradients(tree), state)
        params = optax.apply_updates(params, updates)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, 1e-5), update.params, params
    )
    assert update.opt_state[0].count == 3


def test_step_time_writes_its_tables(tmp_path, capsys):
    options = step_time.Options(
        rounds=2,
        cases=("leaves", "sizes"),
        parameters=320,
        leaves=(1, 16),
        largest=1e3,
        optimizers=("AdaMod",),
        output=tmp_path,
    )
    tables = step_time.main(options)
    assert [*tables] == [
        "256 parameters in 1 leaves",
        "320 parameters in 16 leaves",
        "896 parameters in one leaf",
    ]
    saved = json.loads((tmp_path / "step_time.json").read_text())
    assert saved["tables"] == tables
    assert {"jax", "optax", "python"} <= set(saved["versions"])
    for rows in tables.values():
        assert [row["optimizer"] for row in rows] == ["Adam", "AdaMod"]
        assert all(row["of Adam's time"] > 0 for row in rows)
    printed = capsys.readouterr().out
    for title in tables:
        assert f"## {title}" in printed
        assert f"## {title}" in (tmp_path / "step_time.md").read_text()


def test_bytes_that_an_update_moves():
    tree = trees.equal_leaves(10**6, 1)
    moved = [
        step_time.bytes_per_step(x, tree) / 1e6
        for x in (
            optimizers.ADAM,
            optimizers.ADAMOD,
            optimizers.ADAMOD_BFLOAT16,
            *torch_optimizers.NAMES,
        )
    ]
    np.testing.assert_allclose(moved, [28, 36, 28] + [28] * 2 + [36] * 3, atol=0.001)
    halved = trees.one_leaf(1000, 1024, dtype="bfloat16")
    moved = step_time.bytes_per_step(optimizers.ADAMOD_7_BYTES, halved) / 1.024e6
    assert moved == pytest.approx(6 + 2 * 3 * (1 + 1 / 128), abs=1e-4)


def test_optimizers_are_compiled_for_the_weights_that_they_are_for():
    """bfloat16 where that is the point; the update leaves no other dtype behind."""
    for name in compiled.COMPARED:
        dtype = optimizers.weights_dtype(name)
        tree = trees.one_leaf(2, 128, dtype=dtype)
        tx = optimizers.OPTIMIZERS[name]()
        params, _, updates = jax.eval_shape(
            optimizers.step_in_place(tx), tree, jax.eval_shape(tx.init, tree), tree
        )
        assert params["kernel"].dtype == dtype
        assert updates.keys() == tree.keys()


def test_tracing_starts_from_nothing():
    tree = trees.equal_leaves(64, 2)
    rows = [step_time.compiling("AdaMod", tree, repeats=1) for _ in range(2)]
    assert all(row["leaves"] == 2 and row["trace, ms"] > 0 for row in rows)


def test_what_is_not_installed_is_left_out_and_named(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert torch_optimizers.missing() == set(torch_optimizers.NAMES)
    options = step_time.Options(
        rounds=2,
        cases=("sizes",),
        largest=1e3,
        optimizers=("PyTorch Adam, fused",),
        output=tmp_path,
    )
    (rows,) = step_time.main(options).values()
    assert [row["optimizer"] for row in rows] == ["Adam"]
    text = (tmp_path / "step_time.md").read_text()
    assert "Not installed, so left out: PyTorch Adam, fused." in text


@pytest.mark.parametrize(
    ("nonsense", "message"),
    [
        ({"optimizers": ("SGD",)}, r"--optimizers: \['SGD'\] unknown"),
        ({"cases": ("width",)}, r"--cases: \['width'\] unknown"),
        ({"rounds": 0}, "--rounds must be at least 1, got 0"),
    ],
)
def test_nonsense_is_refused(nonsense, message):
    with pytest.raises(ValueError, match=message):
        step_time.Options(**nonsense)


@pytest.mark.usefixtures("quick_compilation")
def test_training_steps_train(monkeypatch):
    def tiny(batch):
        model = Transformer(1, 8, 2, 4, rngs=nnx.Rngs(0))
        tokens = jnp.ones((batch, 4), int)
        return train_step.of_module(model, tokens, tokens)

    monkeypatch.setitem(train_step.MODELS, "tiny", tiny)
    training = train_step.Training("tiny", optimizers.ADAMOD, 2)
    before = jax.tree.map(np.asarray, training.state[0])
    training.run(3)
    params, opt_state, _ = training.state
    assert opt_state[0].count == 3
    moved = jax.tree.map(lambda x, y: bool((x != y).any()), before, params)
    assert any(jax.tree.leaves(moved))
    assert trees.size(training.parameters) == sum(
        x.size for x in jax.tree.leaves(params)
    )


def test_llama_has_its_size():
    leaves = jax.tree.leaves(llama.shapes(llama.LLAMA_2_7B, "bfloat16"))
    assert sum(x.size for x in leaves) == 6_738_415_616
    fresh = llama.initialised(llama.SMALL, "bfloat16", jax.random.key(0))
    same = jax.tree.map(
        lambda x, y: (x.shape, x.dtype) == (y.shape, y.dtype),
        fresh,
        llama.shapes(llama.SMALL, "bfloat16"),
    )
    assert all(jax.tree.leaves(same))


@pytest.mark.usefixtures("quick_compilation")
def test_llama_sees_no_later_tokens():
    params = llama.initialised(llama.SMALL, "float32", jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (1, 9), 0, 256)

    def loss_of_first(embedded):
        return llama.loss(params | {"tokens": embedded}, tokens[:, :5], heads=2)

    def loss_of_all(embedded):
        return llama.loss(params | {"tokens": embedded}, tokens, heads=2)

    assert loss_of_first(params["tokens"]) == pytest.approx(np.log(256), rel=0.05)
    changed = params["tokens"].at[tokens[0, 6]].add(1.0)
    assert loss_of_all(changed) != loss_of_all(params["tokens"])
    assert loss_of_first(changed) == loss_of_first(params["tokens"])


@pytest.mark.usefixtures("quick_compilation")
def test_whole_steps_train_and_are_weighed(tmp_path):
    options = whole_step.Options(
        small=True, steps=2, tokens=32, optimizers=(optimizers.ADAMOD_7_BYTES,)
    )
    facts = whole_step.train(optimizers.ADAMOD_7_BYTES, options)
    losses = [float(x) for x in facts["losses"].split()]
    assert losses == pytest.approx([np.log(256)] * 2, rel=0.05)
    options = dataclasses.replace(options, steps=0, output=tmp_path)
    ((row,),) = whole_step.main(options).values()
    held = 1e9 * row["arguments, GB"] / 393_856
    assert held == pytest.approx(2 + 3 * (1 + 1 / 128), abs=0.01)
    assert row["peak, GB"] > row["arguments, GB"]
    assert row["fits 80 GB"] == "yes"
    assert "32 tokens" in (tmp_path / "whole_step.md").read_text()


def test_whole_steps_refuse_nonsense():
    with pytest.raises(ValueError, match=r"--optimizers: \['SGD'\] unknown"):
        whole_step.Options(optimizers=("SGD",))
    with pytest.raises(ValueError, match="--steps must be at least 0, got -1"):
        whole_step.Options(steps=-1)


def test_matrices_have_groups_of_128():
    for parameters, leaves in ((25_000_000, 1600), (25_000_000, 160), (2**30, 4)):
        tree = trees.equal_matrices(parameters, leaves)
        assert step_time.has_groups(tree)
        assert len({leaf.shape for leaf in tree.values()}) == 1
        assert trees.size(tree) == pytest.approx(parameters, rel=0.02)
    assert not step_time.has_groups(trees.equal_matrices(320, 16))


def test_each_result_is_written_when_it_is_there(tmp_path, monkeypatch):
    """Also of an optimizer that fails, which says why, and the others go on."""

    def compare(optimizer, tree, rounds):
        if optimizer == "RAdam":
            raise MemoryError("no room")
        written = tmp_path / "step_time.json"
        seen.append(json.loads(written.read_text()) if written.exists() else None)
        return dict.fromkeys(step_time.COLUMNS, 1.0)

    seen = []
    monkeypatch.setattr(step_time, "compare", compare)
    options = step_time.Options(
        cases=("sizes",), largest=1e3, optimizers=("RAdam", "Lion"), output=tmp_path
    )
    ((title, rows),) = step_time.main(options).items()
    assert [row["optimizer"] for row in rows] == ["Adam", "RAdam", "Lion"]
    assert rows[1]["failed"] == "MemoryError: no room"
    assert seen[0] is None
    assert len(seen[1]["tables"][title]) == 2


def test_a_process_of_its_own_is_another_one():
    with timing.a_process() as run:
        other = run(os.getpid)
        assert run(os.getpid) == other != os.getpid()
        with pytest.raises(ZeroDivisionError):
            run(divmod, 1, 0)


@pytest.mark.usefixtures("quick_compilation")
def test_gpt2_learns_its_tokens_and_sees_no_later_ones():
    params = gpt2.initialised(trees.gpt2(1, 64, 32))
    tokens = jax.random.randint(jax.random.key(1), (1, 9), 0, 32)
    assert gpt2.loss(params, tokens) == pytest.approx(np.log(32), rel=0.05)

    def first(positions):
        return gpt2.loss(params | {"positions": positions}, tokens[:, :5])

    changed = params["positions"].at[6].add(1.0)
    assert first(changed) == first(params["positions"])
    whole = [
        gpt2.loss(params | {"positions": x}, tokens)
        for x in (changed, params["positions"])
    ]
    assert whole[0] != whole[1]


def test_parts_of_a_gpus_command_fail_alone(tmp_path, monkeypatch, capsys):
    """Those that fail or take too long are told, with what they said last."""
    folders = {}
    for name, text in {
        "fails": "print('one'); print('two'); raise SystemExit(3)",
        "waits": "import time; print('begun', flush=True); time.sleep(600)",
        "works": "print('fine')",
    }.items():
        folders[name] = ("timeit", "-n", "1", "-r", "1", text)
    commands = [gpu.Part(x, y, 0.5) for x, y in folders.items()]
    monkeypatch.setattr(gpu, "parts", lambda options: commands)
    rows = gpu.main(gpu.Options(minutes=0.2, output=tmp_path))
    assert [row["result"] for row in rows] == [
        "failed with exit code 1",
        "stopped at its limit",
        "done",
    ]
    page = (tmp_path / "gpu.md").read_text()
    assert "one\ntwo" in page
    assert "begun" in (tmp_path / "waits.txt").read_text()
    assert json.loads((tmp_path / "gpu.json").read_text())["tables"]["Parts"] == rows


@pytest.mark.slow
def test_all_parts_run_small(tmp_path):
    rows = gpu.main(gpu.Options(minutes=9, small=True, output=tmp_path))
    assert {row["part"]: row["result"] for row in rows} == dict.fromkeys(
        ("tests", "updates", "steps", "at_scale"), "done"
    )
    for name in ("updates.md", "train_step.md", "at_scale/at_scale.md"):
        assert "| AdaMod |" in (tmp_path / name).read_text()


def test_large_parts_name_what_exists():
    for part in gpu.parts(gpu.Options()):
        if part.name == "updates":
            names = part.command[part.command.index("--optimizers") + 1 :]
            step_time.Options(optimizers=names[: names.index("--output")])
            assert len(names) > 15
        if part.name == "steps":
            names = part.command[part.command.index("--optimizers") + 1 :]
            train_step.Options(optimizers=names[: names.index("--output")])


COMMANDS = [
    path
    for path in sorted(Path(scaling.__file__).parent.glob("*.py"))
    if '"__main__"' in path.read_text()
]


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.stem)
def test_an_unknown_option_is_refused(path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [str(path), "--nonsense"])
    with pytest.raises(SystemExit) as refused:
        runpy.run_path(str(path), run_name="__main__")
    assert refused.value.code == 2
    assert "--nonsense" in "".join(capsys.readouterr())


def test_scaling_writes_its_tables(tmp_path):
    scaling.main(tmp_path)
    assert "## v5p, Llama 3 405B" in (tmp_path / "scaling.md").read_text()


def test_scaling_follows_the_bytes(monkeypatch):
    monkeypatch.setattr(
        scaling,
        "compiled_bytes",
        lambda chip: dict.fromkeys(optimizers.OPTIMIZERS, (36.0, 20.0)),
    )
    rows = scaling.table(scaling.CHIPS["v5p"], 8 * 10**9)
    assert [row["chips"] for row in rows] == [8, 64, 256, 1024, 4096, 8960]
    assert rows[0]["AdaMod: GB a chip"] == pytest.approx(20.0)
    assert rows[0]["AdaMod: ms"] == pytest.approx(1e3 * 36e9 / 2765e9)
    training = 6 * 8e9 * 2**22 / (0.4 * 459e12 * 8)
    share = rows[0]["AdaMod: ms"] / 1e3 / (rows[0]["AdaMod: ms"] / 1e3 + training)
    assert rows[0]["AdaMod: % of a step"] == pytest.approx(100 * share)


def test_8_bits_count_what_lies_between_two_kernels():
    """The codes are read again on a GPU; a TPU writes and reads the update."""
    for name, moved, state in (("H100", 21.07, 3.023), ("v5p", 26.05, 8.0)):
        bytes_moved = scaling.compiled_bytes(scaling.CHIPS[name])
        adam, _ = bytes_moved[optimizers.ADAM]
        assert adam == pytest.approx(28, abs=0.05)
        found, _ = bytes_moved[optimizers.ADAMOD_FLOAT8]
        assert found == pytest.approx(18.05 + state, abs=0.1), name
        assert found == pytest.approx(moved, abs=0.1)


HLO = """HloModule jit_update, is_scheduled=true

%fused (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %m = f32[8]{0} multiply(%p, %p)
}

%command_buffer (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  ROOT %f = f32[8]{0} fusion(%a), kind=kLoop, calls=%fused
}

ENTRY %main (x: f32[8], y: s32[]) -> (f32[8], s32[]) {
  %x = f32[8]{0:T(256)} parameter(0)
  %y = s32[]{:T(128)} parameter(1)
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%y, %one)
  %c = f32[8]{0} call(%x), to_apply=%command_buffer
  %g = f32[8]{0} all-gather-start(%c), dimensions={0}
  ROOT %out = (f32[8]{0}, s32[]) tuple(%g, %next)
}
"""


def test_a_programs_instructions():
    found = [(x.shape, x.operation, x.of_leaves) for x in hlo.instructions(HLO)]
    assert found == [
        ("s32[]{:T(128)}", "add", False),
        ("f32[8]{0}", "fusion", True),
        ("f32[8]{0}", "all-gather-start", True),
    ]
    assert "all-gather-start".startswith(hlo.COLLECTIVES)


SCHEDULE = """
HloModule jit_update, is_scheduled=true

ENTRY %main (x: f32[8,200], e: u8[3,8]) -> (f32[8,200], u8[3,8]) {
  %x = f32[8,200]{1,0:T(8,128)} parameter(0)
  %e = u8[3,8]{1,0:T(8,128)(4,1)} parameter(1)
  %fast = f32[8,200]{1,0:T(8,128)S(1)} fusion(%x), kind=kLoop, calls=%f
  %pair = (f32[8,200]{1,0:T(8,128)}, u8[3,8]{1,0:T(8,128)(4,1)}) fusion(%fast, %e), calls=%g
  %first = f32[8,200]{1,0:T(8,128)} get-tuple-element(%pair), index=0
  %second = u8[3,8]{1,0:T(8,128)(4,1)} get-tuple-element(%pair), index=1
  %turned = u8[3,8]{0,1:T(8,128)(4,1)} copy(%second)
  %again = u8[3,8]{1,0:T(8,128)(4,1)} copy(%turned), metadata={op_name="second()"}
  %view = f32[8,200]{1,0:T(8,128)} bitcast(%first)
  ROOT %out = (f32[8,200]{1,0:T(8,128)}, u8[3,8]{1,0:T(8,128)(4,1)}) tuple(%view, %again)
}
"""  # noqa: E501


def test_bytes_that_are_live_at_once():
    """Padded to tiles; without arguments, results and a TPU's fast memory."""
    assert hlo.bytes_of("f32[8,200]{1,0:T(8,128)}") == 8 * 256 * 4
    assert hlo.bytes_of("f32[8,200]{0,1:T(8,128)}") == 200 * 128 * 4
    assert hlo.bytes_of("bf16[2,8,64]{1,2,0:T(8,128)(2,1)}") == 2 * 64 * 128 * 2
    assert hlo.bytes_of("f32[8,200]{1,0:T(8,128)S(1)}") == 0
    assert hlo.bytes_of("pred[7]{0}") == hlo.bytes_of("u8[7]") == 7
    # The second of the pair, and what it is turned to.
    assert hlo.live_bytes(SCHEDULE) == 2 * 8 * 128
    assert hlo.live_bytes(SCHEDULE.replace("(%view", "(%x")) == 8192 + 2 * 1024


IN_PLACE = """
HloModule jit_update, is_scheduled=true

ENTRY %main (g: f32[256], c: u8[256], n: s32[]) -> (f32[256], u8[256]) {
  %n = s32[] parameter(2)
  %rows = s32[2]{0} iota(), iota_dimension=0
  %numbers = s32[2]{0} fusion(%n, %rows), kind=kLoop, calls=%k
  %g = f32[256]{0} parameter(0)
  %c = u8[256]{0} parameter(1)
  %copied = f32[256]{0} copy(%g)
  %kernel = (u8[256]{0}, f32[256]{0}) custom-call(%numbers, %copied, %c), custom_call_target="tpu_custom_call", output_to_operand_aliasing={{0}: (2, {}), {1}: (1, {})}
  %codes = u8[256]{0} get-tuple-element(%kernel), index=0
  %update = f32[256]{0} get-tuple-element(%kernel), index=1
  %new = f32[256]{0} fusion(%update), kind=kLoop, calls=%f
  ROOT %out = (f32[256]{0}, u8[256]{0}) tuple(%new, %codes)
}
"""  # noqa: E501


def test_a_kernel_that_writes_in_place_takes_no_memory():
    """And what reads no leaf is told apart: indices, and what comes of the count."""
    assert [(x.operation, x.of_leaves) for x in hlo.instructions(IN_PLACE)] == [
        ("iota", False),
        ("fusion", False),
        ("copy", True),
        ("custom-call", True),
        ("fusion", True),
    ]
    assert hlo.live_bytes(IN_PLACE) == 8 + 1024  # the numbers, the copied gradient
    apart = IN_PLACE.replace("{0}: (2, {}), {1}: (1, {})", "{0}: (2, {})")
    assert hlo.live_bytes(apart) == 8 + 2 * 1024


def test_trees_that_are_for_no_target_are_refused():
    options = compiled.Options(targets=("H100",), trees=("Llama 3 8B",))
    with pytest.raises(ValueError, match=r"Llama 3 8B.*H100.*do not go together"):
        compiled.jobs(options)
    all_of_them = compiled.jobs(compiled.Options())
    assert ("H100", "Llama 3.2 1B") in all_of_them
    assert ("H100", "Llama 3 8B") not in all_of_them
    assert len(all_of_them) == 38


def test_automatic_axes_stand_beside_explicit_ones_for_8_bits_on_pods():
    options = compiled.Options(optimizers=("Adam", "AdaMod, 8 bits"))
    assert compiled.rows("v5e 16x16", options) == [
        ("Adam", "explicit"),
        ("AdaMod, 8 bits", "explicit"),
        ("AdaMod, 8 bits", "auto"),
    ]
    assert len(compiled.rows("H100", options)) == 2


FUSIONS = """
%inner.1 (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  ROOT %y = f32[8]{0} negate(%x)
}

%outer.1 (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  ROOT %b = f32[8]{0} fusion(%a), kind=kLoop, calls=%inner.1
}

%outer.2 (c: f32[8]) -> f32[8] {
  %c = f32[8]{0:S(1)} parameter(0)
  ROOT %d = f32[8]{0} fusion(%c), kind=kLoop, calls=%INNER, metadata={op_name="d"}
}

%inner.2 (v: f32[8]) -> f32[8] {
  %v = f32[8]{0} parameter(0)
  ROOT %w = f32[8]{0} OPERATION(%v)
}
"""


@pytest.mark.parametrize(
    ("inner", "operation", "kinds"),
    [("inner.1", "negate", 1), ("inner.2", "negate", 1), ("inner.2", "abs", 2)],
)
def test_kernels_that_differ_in_names_alone_are_of_one_kind(inner, operation, kinds):
    text = FUSIONS.replace("INNER", inner).replace("OPERATION", operation)
    kernels = [
        f"  %{name} = f32[8]{{0}} fusion(%p), kind=kLoop, calls=%outer.{which}"
        for name, which in (("k", 1), ("l", 2), ("m", 2))
    ]
    assert hlo.kinds(text, kernels) == kinds
    assert hlo.kinds(text, [*kernels, "  %n = f32[4]{0} copy(%p)"]) == kinds + 1
