"""Is the translation experiment sound: its data, its model, its search, its command?"""

import itertools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from examples.paper.data import translation as data
from examples.paper.data.locale_pairs import locale_pairs
from examples.paper.models import decoding
from examples.paper.models.translator import (
    Translator,
    label_smoothed_loss,
    sinusoids,
)

END, PAD = data.END, data.PAD


@pytest.fixture(scope="module")
def pairs():
    return locale_pairs()


@pytest.fixture(scope="module")
def tokenizer(pairs):
    return data.train_tokenizer(pairs[:2000], 400)


@pytest.fixture(scope="module")
def model():
    model = nnx.jit(lambda: Translator(20, 2, 16, 32, 2, 0.5, rngs=nnx.Rngs(0)))()
    model.eval()
    return model


@nnx.jit
def logits_of(model, source, target):
    return model(source, target)


def sentences(*rows, length):
    batch = np.full((len(rows), length), PAD, np.int32)
    for row, tokens in zip(batch, rows, strict=True):
        row[: len(tokens)] = tokens
    return batch


def test_locale_pairs_are_many_and_distinct(pairs):
    assert len(pairs) >= 20_000
    assert len({german for german, _ in pairs}) == len(pairs)
    assert pairs[:100] == locale_pairs()[:100]
    for text in itertools.chain.from_iterable(pairs):
        assert text
        assert text == " ".join(text.split())  # CLDR's narrow spaces are plain


def test_locale_pairs_translate(pairs):
    """Some of every kind, drawn or not by the seed, are what a reader expects."""
    english = dict(pairs)
    seen = 0
    months = ("Januar", "January"), ("Mai", "May"), ("Oktober", "October")
    for (german, name), year in itertools.product(months, range(1950, 2050)):
        if (found := english.get(f"{german} {year}")) is not None:
            assert found == f"{name} {year}"
            seen += 1
    assert seen > 30
    kinds = ("Kilometer pro Stunde", "kilometers per hour"), ("Euro", "euros")
    for german, name in kinds:
        found = [e for g, e in pairs if g.endswith(" " + german) and g[0] != "1"]
        assert found
        assert all(e.endswith(" " + name) for e in found)
    assert any(e.endswith(" PM") for e in english.values())
    assert sum(g.startswith("vor ") and e.endswith(" ago") for g, e in pairs) > 50


def test_splits_share_no_pair(pairs, monkeypatch):
    monkeypatch.setattr(data, "locale_pairs", lambda: pairs)
    splits = data.laptop_pairs(held_out=500)
    assert len(splits.validation) == len(splits.test) == 500
    german = [{g for g, _ in x} for x in (splits.train, splits.validation, splits.test)]
    assert all(not a & b for a, b in itertools.combinations(german, 2))
    assert sum(map(len, german)) == len(pairs)


def test_tokens_become_the_same_text(tokenizer, pairs):
    texts = [*pairs[-200:], ("Ein 日本 \t Satz.", "  §½ 🙂")]  # unseen, even foreign
    encoded = data.encode(tokenizer, texts)
    longest = max(map(len, itertools.chain.from_iterable(encoded)))
    batch = data.pad(encoded, longest)
    assert batch["source"].dtype == np.int32
    for name, side in zip(("source", "target"), zip(*texts, strict=True), strict=True):
        assert data.decode(tokenizer, batch[name]) == list(side)
        assert np.all(np.sum(batch[name] == END, axis=1) == 1)
    assert tokenizer.get_vocab_size() == 400
    digits = tokenizer.encode("1234").tokens
    assert digits == ["1", "2", "3", "4"]


def test_training_batches_hold_about_as_many_tokens():
    encoded = [([2 + i % 7] * (i % 8) + [END], [END]) for i in range(97)]
    batches = data.training_batches(encoded, (4, 8), tokens=32, seed=0)
    shapes = {batches[i]["source"].shape for i in range(40)}
    assert shapes == {(8, 4), (4, 8)}
    for i in range(40):
        batch = batches[i]
        lengths = np.sum(batch["source"] != PAD, axis=1)
        assert np.all((lengths > 4) == (batch["source"].shape[1] == 8))
        chex.assert_trees_all_equal(batch, batches[i])  # resumed runs see the same
    again = data.training_batches(encoded, (4, 8), tokens=32, seed=1)
    assert any(np.any(again[i]["source"] != batches[i]["source"]) for i in range(4))


def test_every_pair_is_trained_on_equally_often():
    encoded = [([2 + i, *[2] * (i % 8), END], [END]) for i in range(64)]
    batches = data.training_batches(encoded, (5, 10), tokens=40, seed=0)
    # 32 pairs in batches of 8 and 32 in batches of 4: an epoch is 4 + 8 batches.
    counts = np.zeros(64, int)
    for i in range(6 * 12):
        np.add.at(counts, batches[i]["source"][:, 0] - 2, 1)
    np.testing.assert_array_equal(counts, 6)


def test_held_out_batches_hold_each_pair_once():
    encoded = [([2 + i, *[2] * (i % 7), END], [3, END]) for i in range(21)]
    batches = data.held_out_batches(encoded, (4, 8), tokens=16)
    assert {b["source"].shape for b in batches} == {(4, 4), (2, 8)}
    first = np.concatenate([b["source"][:, 0] for b in batches])
    assert sorted(first[first != PAD]) == list(range(2, 23))


def test_long_pairs():
    encoded = [([2, END], [END]), ([2] * 8 + [END], [END]), ([END], [2] * 9)]
    assert data.within(encoded, 8) == encoded[:1]
    assert data.within(encoded, 9) == encoded
    with pytest.raises(ValueError, match=r"9 tokens fits none of the lengths \(4, 8\)"):
        data.training_batches(encoded, (4, 8), tokens=16, seed=0)


ROWS = [
    {"translation": {"de": f"Das ist Satz {i}.", "en": f"This is Sentence {i}."}}
    for i in range(3)
]


@pytest.fixture
def _own_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.usefixtures("_own_cache")
@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".json"])
def test_iwslt14_from_files(tmp_path, suffix):
    import datasets

    for split, rows in zip(data.SPLITS, (ROWS, ROWS[:2], ROWS[2:]), strict=True):
        path = tmp_path / (split + suffix)
        if suffix == ".parquet":
            datasets.Dataset.from_list(rows).to_parquet(path)
        else:
            path.write_text("\n".join(map(json.dumps, rows)))
    pairs = data.iwslt14_pairs(tmp_path)
    assert pairs.train[1] == ("das ist satz 1.", "this is sentence 1.")
    assert [len(x) for x in (pairs.train, pairs.validation, pairs.test)] == [3, 2, 1]


@pytest.mark.usefixtures("_own_cache")
def test_iwslt14_says_what_is_missing(tmp_path, monkeypatch):
    import datasets

    for split in ("train", "test"):
        (tmp_path / f"{split}.json").write_text(json.dumps(ROWS[0]))
    with pytest.raises(
        ValueError, match=r"has no validation.parquet, validation.jsonl"
    ):
        data.iwslt14_pairs(tmp_path)
    (tmp_path / "validation.json").write_text(json.dumps({"translation": {"de": "a"}}))
    with pytest.raises(
        ValueError, match=r"validation must have rows .*got .*'de': 'a'"
    ):
        data.iwslt14_pairs(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"Without a network put train\.parquet.*--data"):
        data.iwslt14_pairs()


def test_sinusoids():
    table = sinusoids(50, 8)
    np.testing.assert_allclose(table[0], [0] * 4 + [1] * 4)
    np.testing.assert_allclose(table[7, [0, 4]], [np.sin(7), np.cos(7)], rtol=1e-6)
    np.testing.assert_allclose(table[7, 3], np.sin(7e-4), rtol=1e-6)


def test_padding_changes_no_logit(model):
    source, target = [3, 4, 5, END], [6, 7, END]
    alone = logits_of(model, sentences(source, length=4), sentences(target, length=3))
    padded = logits_of(
        model,
        sentences(source, [8, 9, 10, 11, 12, END], length=7),
        sentences(target, [4, 5, 6, 7, 8, END], length=6),
    )
    np.testing.assert_allclose(padded[0, :3], alone[0], rtol=1e-4, atol=1e-5)


def test_no_token_sees_those_after_it(model):
    source = sentences([3, 4, 5, END], length=4)
    before = logits_of(model, source, sentences([6, 7, 8, 9, END], length=5))
    after = logits_of(model, source, sentences([6, 7, 10, 11, END], length=5))
    # The logits at a place depend on the tokens before it, and no others.
    np.testing.assert_array_equal(before[:, :3], after[:, :3])
    assert np.all(np.max(np.abs(before - after)[:, 3:], axis=-1) > 1e-3)


def test_every_source_token_matters(model):
    target = sentences([6, 7, END], length=3)
    before = logits_of(model, sentences([3, 4, 5, END], length=4), target)
    for i in range(3):
        changed = [3, 4, 5, END]
        changed[i] = 9
        after = logits_of(model, sentences(changed, length=4), target)
        assert np.max(np.abs(before - after)) > 1e-3


def test_steps_give_the_logits_of_the_whole(model):
    source = sentences([3, 4, 5, END], [8, END], length=5)
    target = sentences([6, 7, 8, 9, END], [10, 11, END], length=6)
    expected = logits_of(model, source, target)
    start = nnx.jit(lambda model, source: model.start(source, 6))
    cache, last = start(model, source), jnp.array([END, END])
    step = nnx.jit(lambda model, *arguments: model.step(*arguments))
    for i in range(6):
        logits, cache = step(model, last, jnp.int32(i), cache)
        np.testing.assert_allclose(logits, expected[:, i], rtol=1e-4, atol=1e-5)
        last = target[:, i]


def test_architecture_of_fairseq():
    size = dict(vocabulary=100, depth=6, width=512, hidden=1024, heads=4, dropout=0.3)
    model = nnx.eval_shape(lambda: Translator(**size, rngs=nnx.Rngs(0)))
    parameters = nnx.state(model, nnx.Param)
    total = sum(x.size for x in jax.tree.leaves(parameters))
    # fairseq counts 39,469,056 with vocabularies of 8,848 and 6,632; the decoder's
    # embedding is used twice.
    assert total == 39_469_056 - 512 * (8848 + 6632) + 512 * 2 * 100


def test_dropout_is_of_training_alone():
    model = nnx.jit(lambda: Translator(20, 1, 8, 8, 2, 0.5, rngs=nnx.Rngs(0)))()
    source, target = sentences([3, END], length=4), sentences([6, 7, END], length=3)
    first, second = (logits_of(model, source, target) for _ in range(2))
    assert np.all(np.max(np.abs(first - second), axis=-1) > 1e-3)
    model.eval()
    first, second = (logits_of(model, source, target) for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_label_smoothing():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 3, 5)).astype(np.float32)
    target = np.array([[2, 3, END], [4, END, PAD]])
    smoothed = optax.smooth_labels(jax.nn.one_hot(target, 5), 0.1)
    losses = optax.softmax_cross_entropy(logits, smoothed)
    expected = np.mean(np.asarray(losses)[target != PAD])
    np.testing.assert_allclose(
        label_smoothed_loss(logits, target, 0.1), expected, rtol=1e-6
    )


class Chain(nnx.Module):
    """Gives each token a probability by the token before it alone."""

    def __init__(self, probabilities):
        self.log_p = nnx.Variable(jnp.log(jnp.asarray(probabilities)))

    def start(self, source, length):
        return jnp.zeros((source.shape[0], length))

    def step(self, tokens, position, cache):
        return self.log_p[...][tokens], cache


def chain(**transitions):
    """Of PAD, END and the tokens 2, 3, 4."""
    probabilities = np.full((5, 5), 1e-6)
    for i, row in enumerate(transitions.values(), start=1):
        probabilities[i] = row
    return Chain(probabilities)


# Greedily 2 is the better beginning, but nothing likely follows it.
GARDEN_PATH = dict(
    start=[0.3, 1e-6, 0.4, 0.3, 1e-6],
    two=[1e-6, 0.3, 0.2, 0.25, 0.25],
    three=[1e-6, 0.05, 1e-6, 1e-6, 0.95],
    four=[1e-6, 0.9, 0.05, 0.03, 0.02],
)


def score(model, tokens, length_penalty):
    log_p, last = 0.0, END
    for token in tokens:
        log_p += float(jax.nn.log_softmax(model.log_p[last])[token])
        last = token
    return log_p / len(tokens) ** length_penalty


def likeliest(model, length, length_penalty):
    """Of all sentences of up to ``length`` tokens, by trying each."""
    found = [
        (*body, END)
        for n in range(length)
        for body in itertools.product((2, 3, 4), repeat=n)
    ]
    return max(found, key=lambda x: score(model, x, length_penalty))


def test_beam_search_leaves_the_garden_path():
    model, source = chain(**GARDEN_PATH), np.zeros((2, 1), np.int32)
    greedy = np.asarray(decoding.greedy_search(model, source, 4))
    assert greedy.tolist() == [[2, END, PAD, PAD]] * 2
    beam = np.asarray(decoding.beam_search(model, source, 4, 3))
    assert beam.tolist() == [[3, 4, END, PAD]] * 2
    assert likeliest(model, 4, 1.0) == (3, 4, END)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_wide_beam_search_finds_the_likeliest(seed, length_penalty):
    logits = np.random.default_rng(seed).normal(size=(5, 5), scale=2)
    model = chain(**dict(zip("abcd", np.exp(logits[1:]), strict=True)))
    source = np.zeros((1, 1), np.int32)
    found = np.asarray(decoding.beam_search(model, source, 4, 40, length_penalty))
    expected = likeliest(model, 4, length_penalty)
    # Exhaustive up to normalising, which leaves PAD out of no sentence's order.
    assert found[0][: len(expected)].tolist() == list(expected)


def test_a_beam_of_one_is_greedy(model):
    source = np.random.default_rng(0).integers(2, 20, size=(6, 5)).astype(np.int32)
    greedy = np.asarray(decoding.greedy_search(model, source, 8))
    beam = np.asarray(decoding.beam_search(model, source, 8, 1))
    np.testing.assert_array_equal(greedy, beam)
    assert len({tuple(row) for row in greedy}) > 1  # sources matter
    wide = np.asarray(decoding.beam_search(model, source, 8, 3))
    for row in [*greedy.tolist(), *wide.tolist()]:
        end = row.index(END)  # all are closed
        assert PAD not in row[:end]
        assert set(row[end + 1 :]) <= {PAD}
