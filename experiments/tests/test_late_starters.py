"""Do late starters start late, and does the rule what it says? Is no run repeated?"""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments import late_starters
from experiments.common.training import initial_state, loss_and_rest
from experiments.late_starters import Key, Options
from experiments.tasks.late import BYTES, LATE_EXPERTS, NEW, TASKS, Size, with_pairs
from experiments.tests.helpers import run_of

SMALL = Size(steps=6, depth=2, width=8, pretraining=2)


def late_of(name, params):
    """What of the parameters starts late, leaf by leaf."""
    blocks = [*params["blocks"].values()]
    first = blocks[0]
    if name == "zero_head":
        return {key: x for key, x in params.items() if key != "logits"}
    if name == "zero_branches":
        layers = [x["attention"][key] for x in blocks for key in ("query", "value")]
        return [*layers, *(x["expand"] for x in blocks)]
    if name == "lora":
        return [x["expand"]["a"] for x in blocks]
    if name.startswith("frozen"):
        return first
    if name == "experts":
        half = LATE_EXPERTS * 2 * SMALL.width
        return [
            (x["expand"]["experts"]["kernel"][:, half:], x["contract"]["kernel"][half:])
            for x in blocks
        ]
    if name == "new_tokens":
        head = params["logits"]
        return [
            params["tokens"]["embedding"][BYTES:],
            head["kernel"][:, BYTES:],
            head["bias"][BYTES:],
        ]
    assert name == "full_fine_tuning"
    return []


@functools.cache
def found(name):
    return TASKS[name](SMALL)


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("name", TASKS)
def test_gradients_of_late_starters_are_zero_at_first(name):
    task = found(name).task
    params, rest, _ = initial_state(task, run_of())
    both = jax.jit(jax.grad(loss_and_rest(task), has_aux=True))
    start = task.steps // 3
    if name in ("zero_head", "zero_branches", "lora"):
        start = 1
    batches = task.batches(0)
    for step in range(start):
        gradients, _ = both(params, rest, batches[step])
        for x in jax.tree.leaves(late_of(name, gradients)):
            assert not np.any(x)
        assert any(np.any(x) for x in jax.tree.leaves(gradients))
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients)
    gradients, _ = both(params, rest, batches[start])
    for x in jax.tree.leaves(late_of(name, gradients)):
        assert np.any(x)


def test_lora_trains_its_two_matrices_alone_and_starts_as_the_base():
    params, *_ = initial_state(found("lora").task, run_of())
    names = {path[-1].key for path, _ in jax.tree.leaves_with_path(params)}
    assert names == {"a", "b"}
    models = [
        found(name).task.create_model(nnx.Rngs(0))
        for name in ("lora", "full_fine_tuning")
    ]
    windows = jnp.arange(16)[None]
    np.testing.assert_allclose(*(model(windows) for model in models), rtol=1e-5)


def test_pairs_of_bytes_are_tokens_and_say_the_same():
    text = np.frombuffer(b"abababxyab" * 30 + b"q", np.uint8)
    tokens = with_pairs(text)
    assert len(tokens) == 150
    assert tokens.min() >= BYTES
    assert tokens.max() < BYTES + NEW
    assert tokens[0] == BYTES  # the most common one
    np.testing.assert_array_equal(tokens[:5] == tokens[0], [1, 1, 1, 0, 1])


def options_of(tmp_path, **changes):
    usual = dict(tasks=("zero_head",), size=SMALL, output=tmp_path)
    return Options(**usual | changes)


@pytest.mark.usefixtures("quick_compilation")
def test_only_what_is_missing_is_run(tmp_path, monkeypatch):
    ran = []

    def run(task, creates, rates, seed, progress):
        ran.append((seed, len(rates)))
        return [2.0 + seed] * len(rates)

    monkeypatch.setattr(late_starters, "final_losses", run)
    radam = {"RAdam": late_starters.optimizers(found("zero_head"))["RAdam"]}
    monkeypatch.setattr(late_starters, "optimizers", lambda late: radam)
    late_starters.main(options_of(tmp_path, seeds=1))
    losses = late_starters.main(options_of(tmp_path, seeds=2))
    assert ran == [(0, 5), (1, 5)]
    assert len(losses) == 10
    path = tmp_path / "late_starters.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-2]))
    late_starters.main(options_of(tmp_path, seeds=2))
    assert ran[2:] == [(1, 2)]
    assert losses[Key("zero_head", "RAdam", 1e-3, 1)] == 3
    with pytest.raises(ValueError, match="other settings"):
        late_starters.main(options_of(tmp_path, size=Size(steps=7)))


def test_later_seeds_train_the_best_warmup_alone(tmp_path):
    late = found("zero_head")
    path = tmp_path / "runs.csv"
    everyone = [*late_starters.optimizers(late)]
    linear = [x for x in everyone if "linear" in x]
    losses = {
        Key("zero_head", name, rate, 0): {linear[1]: 2.0, linear[0]: math.nan}.get(
            name, 3.0
        )
        for name in everyone
        for rate in late.rates
    }
    late_starters.add(path, losses)
    chex.assert_trees_all_equal(late_starters.read(path), losses)
    wanted = [*late_starters.missing({"zero_head": late}, 2, path)]
    assert {seed for _, _, seed, _ in wanted} == {1}
    assert [x for _, x, _, _ in wanted if "linear" in x] == [linear[1]]
    by_optimizer = late_starters.by_optimizer("zero_head", late, losses)
    assert by_optimizer[late_starters.TUNED] == [{0: 2.0}] * 5


def test_runs_that_train_are_counted_and_who_diverges_is_never_best():
    late = found("zero_head")
    low, high = late.plateau - 0.3, late.plateau - 0.2
    assert late_starters.trains(late, [low, high, math.nan]) == 1
    assert late_starters.best_rate([{0: math.nan}, {0: 3.0}, {0: 2.0, 1: 3.0}]) == 2


def test_who_has_more_seeds_is_compared_by_those_that_both_have():
    late = found("zero_head")
    published = [{0: 2.0, 1: 2.0}] * 5
    rule = [{0: 2.2, 1: 2.4, 2: 9.0}] * 5
    both = {late_starters.PUBLISHED: published, late_starters.RULE: rule}
    text = late_starters.summary({"zero_head": late}, {"zero_head": both})
    assert text.splitlines()[-1] == "| zero_head | +0.00 %, 100% | +15.00 %, 100% |"
