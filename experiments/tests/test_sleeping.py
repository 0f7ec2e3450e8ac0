"""Are the sleepers, and what may be done about them, what the experiments say?"""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from experiments import (
    learning_rate_sweep,
    sleeping,
    sleeping_units,
    sleeping_words,
    waking,
)
from experiments.data.words import load_words, words_of
from experiments.lazy_bounds import VARIANTS, lazy_adamod
from experiments.training import Run
from optax_adamod import adamod

SETTINGS = dict(b1=0.9, b2=0.999, b3=0.999)


def follow(tx, gradients):
    """The updates and states of a trajectory of gradients."""
    params = jnp.zeros_like(gradients[0])

    @jax.jit
    def steps(gradients):
        def step(state, g):
            updates, state = tx.update(g, state, params)
            return state, (updates, state)

        return jax.lax.scan(step, tx.init(params), gradients)[1]

    updates, states = steps(jnp.asarray(gradients))
    return np.asarray(updates), states


def wakes_after(steps, awake):
    return np.repeat([0.0, 1.0], [steps, awake]).astype(np.float32)[:, None]


def rates_of_waking(steps, awake):
    """Adam's rates over the learning rate, and its averages of the gradients."""
    k = np.arange(1, awake + 1)
    root = np.sqrt((1 - 0.999**k) / (1 - 0.999 ** (steps + k)))
    return 1 / root, 1 - 0.9**k


def test_the_published_bound_does_not_hold_when_a_coordinate_wakes():
    updates, _ = follow(adamod(0.01, **SETTINGS), wakes_after(5000, 10))
    rate, m_hat = rates_of_waking(5000, 10)
    np.testing.assert_allclose(-updates[5000:, 0] / 0.01, rate * m_hat, rtol=1e-4)
    assert rate[0] * m_hat[0] > 3.1  # learning rates, in the first step


def test_a_kept_bound_opens_from_where_it_was():
    updates, _ = follow(lazy_adamod(0.01, "kept", **SETTINGS), wakes_after(5000, 10))
    rate, m_hat = rates_of_waking(5000, 10)
    s = [0.001 * np.sum(0.999 ** np.arange(k)[::-1] * rate[:k]) for k in range(1, 11)]
    np.testing.assert_allclose(-updates[5000:, 0] / 0.01, s * m_hat, rtol=1e-4)
    assert s[0] * m_hat[0] < 0.0032


def test_an_opened_bound_knows_the_time():
    updates, _ = follow(lazy_adamod(0.01, "opened", **SETTINGS), wakes_after(700, 1))
    rate, m_hat = rates_of_waking(700, 1)
    expected = (1 - 0.999**701) * rate * m_hat
    np.testing.assert_allclose(-updates[700:, 0] / 0.01, expected, rtol=1e-4)


def test_a_frozen_rate_is_that_of_the_gradients_there_were():
    gradients = np.zeros((2000, 1), np.float32)
    gradients[199::200] = 0.5
    updates, states = follow(lazy_adamod(0.01, "frozen", **SETTINGS), gradients)
    nu, bound = (np.asarray(optax.tree.get(states, x))[199:] for x in ("nu", "bound"))
    np.testing.assert_allclose(nu, 0.25, rtol=1e-5)
    np.testing.assert_allclose(bound, 2, rtol=1e-5)
    last = -updates[-1, 0] / 0.01
    m_hat = 0.1 / (1 - 0.9**200)  # in gradients: none is left of those before
    np.testing.assert_allclose(last, (1 - 0.999**2000) * m_hat, rtol=1e-4)


@pytest.mark.parametrize("name", VARIANTS)
def test_nothing_changes_for_who_never_sleeps(name):
    rng = np.random.default_rng(0)
    gradients = rng.normal(size=(60, 5)).astype(np.float32) * 10.0 ** np.arange(-2, 3)
    updates, _ = follow(lazy_adamod(0.01, name, **SETTINGS), gradients)
    expected, _ = follow(adamod(0.01, **SETTINGS), gradients)
    chex.assert_trees_all_close(updates, expected, rtol=2e-4)


@pytest.mark.parametrize("name", ["kept", "opened", "frozen"])
def test_averages_stand_still_asleep(name):
    gradients = np.array([[0.3], [0.2], [0.0], [0.0]], np.float32)
    updates, states = follow(lazy_adamod(0.01, name, **SETTINGS), gradients)
    bound, nu = (np.asarray(optax.tree.get(states, x)) for x in ("bound", "nu"))
    assert bound[0] != bound[1] == bound[2] == bound[3]
    assert (nu[2] == nu[1]) == (name == "frozen")
    assert (updates[2:] < 0).all()  # by the average of the gradients before


def record(learning_rate=0.1, steps=40):
    """One coordinate always awake, one every 4th step, one every 20th, one never."""
    t = np.arange(1, steps + 1)[:, None]
    gradients = (t % np.array([1, 4, 20, steps + 1]) == 0) * np.float32(0.5)
    inner = optax.scale(-learning_rate)
    tx = waking.record_updates(inner, learning_rate, lambda tree: tree, 4)
    updates, states = follow(tx, gradients)
    chex.assert_trees_all_equal(updates, np.float32(-learning_rate) * gradients)
    return jax.tree.map(lambda x: x[-1], states)


def test_recorder_counts_by_how_often_a_coordinate_was_awake(monkeypatch):
    monkeypatch.setattr(waking, "FIRST", 10)
    state = record()
    np.testing.assert_array_equal(state.awake, [40, 10, 2, 0])
    # From step 10: 31 steps; every 4th from 12; the 20th and 40th, one in 20 each.
    np.testing.assert_array_equal(state.counts.sum(axis=1), [0, 2, 8, 31])
    np.testing.assert_allclose(state.largest, [0, 0.5, 0.5, 0.5])
    row = waking.recorded(state)
    assert row["awake 5 to 50 %: updates"] == 8
    assert row["awake above 50 %: median"] == pytest.approx(0.5)
    assert waking.asleep(row | {"step": 40}, 4) == pytest.approx(1 - 41 / (4 * 31))
    assert not any("below 0.5 %" in name for name in row)


def test_recorder_waits_until_shares_can_be_told():
    state = record()
    assert not state.counts.any()
    assert waking.recorded(state) == {}
    assert math.isnan(waking.asleep({"step": waking.FIRST - 1}, 4))


def test_quantiles():
    counts = np.zeros(len(waking.EDGES) + 1, int)
    counts[[10, 40, 61]] = 50, 49, 1
    edge = 10.0**waking.EDGES
    assert waking.quantile(counts, 0.5) == pytest.approx(edge[10])
    assert waking.quantile(counts, 0.51) == pytest.approx(edge[40])
    assert waking.quantile(counts, 0.999) == math.inf


def test_share_of_batches():
    rng = np.random.default_rng(0)
    counts = np.array([70, 29, 1, 0])
    batches = rng.choice(4, size=(4000, 10), p=counts / 100)
    found = [(batches == word).any(axis=1).mean() for word in range(4)]
    np.testing.assert_allclose(waking.awake_share(counts, 10), found, atol=0.02)


SOURCE = '''
# Says so.
def f(x):
    """One two."""
    return x + 1.5
'''


def test_words_of_python(tmp_path):
    path = tmp_path / "f.py"
    path.write_text(SOURCE)
    assert list(words_of(path)) == [
        "#", "Says", "so", ".",
        "def", "f", "(", "x", ")", ":", "NEWLINE", "INDENT",
        '"', '"', '"', "One", "two", ".", '"', '"', '"', "NEWLINE",
        "return", "x", "+", "1.5", "NEWLINE", "DEDENT",
    ]  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """20,000 words in all, the last 1,000 of which are another one."""
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "a.py").write_text("a\n" * 8999 + "b c\n" * 334)
    (folder / "b.py").write_text("b\n" * 500)
    return folder


def test_words_held_out(folder):
    words = load_words(folder, at_least=10)
    assert words.vocabulary == ["NEWLINE", "a", "b", "c"]
    assert (len(words.train), len(words.validation)) == (19_000, 1000)
    np.testing.assert_array_equal(words.counts, np.bincount(words.train))
    assert words.vocabulary[words.validation[0]] == "b"
    np.testing.assert_array_equal(np.unique(words.validation), [0, 2])


def test_too_few_words(folder):
    with pytest.raises(ValueError, match=r"hold 20000 words, and 40000 are needed"):
        load_words(folder, at_least=2000)


class Echo(nnx.Module):
    """Is rather sure that a NEWLINE is followed by another, and of nothing else."""

    def __call__(self, tokens):
        return 2.0 * jax.nn.one_hot(tokens, 4) * (tokens == 0)[..., None]


def test_losses_by_the_word_before(folder):
    words = load_words(folder, at_least=10)
    row = sleeping_words.validate(Echo(), words, context=4, batch=2)
    after_newline, after_b = math.log(3 + math.e**2), math.log(4)  # they take turns
    assert row == {
        "validation loss": pytest.approx((after_newline + after_b) / 2, rel=1e-5),
        "after words in above 50 %": pytest.approx(after_newline, rel=1e-5),
        "after words in 5 to 50 %": pytest.approx(after_b, rel=1e-5),
    }


def test_optimizers():
    found = sleeping.optimizers(0.1, 30, b2=0.9, b3=0.8)
    assert list(found) == [
        "Adam", "Adam, 30 steps of warm-up", "AdaMod",
        "AdaMod, kept", "AdaMod, opened", "AdaMod, frozen", "AdaMod, started",
    ]  # fmt: skip
    gradients = np.ones((2, 1), np.float32)
    first = [float(follow(tx, gradients)[0][0, 0]) for tx in found.values()]
    np.testing.assert_allclose(first, [-0.1, -0.1 / 30, *[-0.02] * 5], rtol=1e-4)


@pytest.fixture
def two_optimizers(monkeypatch):
    """All seven take a minute to compile."""

    def few(*arguments, whole=sleeping.optimizers):
        found = whole(*arguments)
        return {name: found[name] for name in ("Adam", "AdaMod, frozen")}

    monkeypatch.setattr(sleeping, "optimizers", few)
    monkeypatch.setattr(waking, "FIRST", 1)


@pytest.mark.usefixtures("two_optimizers", "quick_compilation")
def test_words_run(folder, tmp_path, capsys):
    options = sleeping_words.Options(
        rates=(1e-2,), seeds=1, steps=4, warmup=2, depth=1, width=4, batch=2,
        text=folder, output=tmp_path / "out",
    )  # fmt: skip
    history = sleeping_words.main(options)
    assert [run.b3 for run in history] == [None, 0.99]
    for rows in history.values():
        assert rows[-1]["loss"] < rows[0]["loss"]
        assert rows[-1]["awake above 50 %: updates"] > 0
    printed = capsys.readouterr().out
    assert "Validation loss after 4 steps:" in printed
    assert "| optimizer | lr | after words in 5 to 50 % |" in printed
    assert "the entropy of single words" in printed
    assert "| AdaMod, frozen | 0.01 | never left | 4, 0.0 horizons of 100 |" in printed


@pytest.mark.usefixtures("two_optimizers", "quick_compilation")
def test_units_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sleeping_units, "BLOCKS", (1,))
    monkeypatch.setattr(sleeping_units, "WIDTH", 2)
    options = sleeping_units.Options(
        rates=(1e-2,), seeds=1, steps=5, warmup=2, output=tmp_path
    )
    history = sleeping_units.main(options)
    assert len(history) == 2
    for rows in history.values():
        assert rows[-1]["awake above 50 %: updates"] > 0
        assert 0 < rows[-1]["awake above 50 %: median"] < 10
        assert 0 <= rows[-1]["share of coordinates asleep"] < 1
    printed = capsys.readouterr().out
    assert "| AdaMod, frozen |" in printed
    assert "Share of coordinates asleep after 5 steps:" in printed


def test_tables():
    row = {"step": 9, "loss": 1.0, "awake below 0.5 %: updates": 3.0}
    sizes = {f"awake below 0.5 %: {x}": 0.1 for x in ("median", "99 %", "largest")}
    runs = [Run("AdaMod", optax.identity(), 0.1, seed, 0.9) for seed in range(3)]
    factors = dict(zip(runs, (1, 2, 9), strict=True))
    history = {
        run: [row | {key: x * value for key, value in sizes.items()}]
        for run, x in factors.items()
    }
    table = waking.updates_table(history)
    assert "| AdaMod | 0.1 | 0.2, 0.2, 0.9 |  |  |  |" in table
    losses = waking.losses_table(history, ["loss"], "Losses")
    assert losses.startswith("Losses:\n\n| optimizer | lr | loss |")
    assert "| AdaMod | 0.1 | 1.000 (1.000 to 1.000) |" in losses


@pytest.mark.parametrize(
    "options", [sleeping_words.Options, sleeping_units.Options], ids=["words", "units"]
)
@pytest.mark.parametrize(
    ("nonsense", "message"),
    [
        ({"seeds": 0}, "--seeds must be at least 1, got 0"),
        ({"batch": 0}, "--batch must be at least 1, got 0"),
        ({"rates": (0.0,)}, r"--rates must be positive, got \(0.0,\)"),
        ({"b2": 1.0}, r"--b2 must be in \(0, 1\), got 1.0"),
        ({"b3": 0.0}, r"--b3 must be in \(0, 1\), got 0.0"),
    ],
)
def test_nonsense_is_refused(options, nonsense, message):
    with pytest.raises(ValueError, match=message):
        options(**nonsense)


def test_heads_divide_the_width():
    with pytest.raises(ValueError, match="--width must be a multiple of 4"):
        sleeping_words.Options(width=learning_rate_sweep.HEADS + 1)
