"""Is the translation experiment sound: its data, its model, its search, its command?"""

import csv
import dataclasses
import itertools
import json

import chex
import datasets
import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import sacrebleu
from flax import nnx

from examples.paper import translation
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
    model = nnx.jit(lambda: Translator(20, 1, 16, 32, 2, 0.5, rngs=nnx.Rngs(0)))()
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
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_iwslt14_from_files(tmp_path, suffix):
    folder = tmp_path / "iwslt14"
    folder.mkdir()
    for split, rows in dict(train=ROWS, validation=ROWS[:2], test=ROWS[2:]).items():
        path = folder / (split + suffix)
        if suffix == ".parquet":
            datasets.Dataset.from_list(rows).to_parquet(path)
        else:
            path.write_text("\n".join(map(json.dumps, rows)))
    pairs = data.iwslt14_pairs(str(folder))
    assert pairs.train[1] == ("das ist satz 1.", "this is sentence 1.")
    assert [len(x) for x in vars(pairs).values()] == [3, 2, 1]


@pytest.mark.usefixtures("own_cache")
def test_iwslt14_says_what_is_missing(tmp_path, monkeypatch):
    with pytest.raises(OSError, match=r"'/no/such/folder'.*give that with --data"):
        data.iwslt14_pairs("/no/such/folder")
    folder = tmp_path / "iwslt14"
    folder.mkdir()
    (folder / "train.jsonl").write_text(json.dumps({"translation": {"de": "a"}}))
    with pytest.raises(
        ValueError, match=r"rows of the split 'train' must be .*'de': 'a'"
    ):
        data.iwslt14_pairs(str(folder))
    (folder / "train.jsonl").write_text(json.dumps(ROWS[0]))
    with pytest.raises(OSError, match=r"cannot load the split 'validation'"):
        data.iwslt14_pairs(str(folder))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match=r"bbaaaa/iwslt14-de-en.*Without a network, copy"):
        data.iwslt14_pairs()


def test_iwslt14_on_the_hub(monkeypatch):
    """Its main branch is a program, which is no longer run."""
    asked = []

    def load(source, split, revision):
        asked.append((source, split, revision))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert len(data.iwslt14_pairs().test) == 3
    converted = "bbaaaa/iwslt14-de-en", "refs/convert/parquet"
    assert [x[::2] for x in asked] == [converted] * 3
    assert [x[1] for x in asked] == ["train", "validation", "test"]


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


def test_initial_values_of_fairseq():
    model = nnx.jit(lambda: Translator(500, 1, 64, 96, 2, 0.5, rngs=nnx.Rngs(0)))()
    model.eval()
    layer = model.decoder[0]
    for kernel, limit in (
        (layer.source_attention.query.kernel, (6 / (4 * 64)) ** 0.5),
        (layer.target_attention.key_value.kernel, (6 / (4 * 64)) ** 0.5),
        (layer.source_attention.out.kernel, (6 / (2 * 64)) ** 0.5),
        (layer.feed_forward.expand.kernel, (6 / (64 + 96)) ** 0.5),
    ):
        assert 0.98 * limit < np.max(np.abs(kernel[...])) <= limit
    for tokens in (model.source_tokens, model.target_tokens):
        table = np.asarray(tokens.embedding[...])
        assert 0.98 < np.std(table) * 64**0.5 < 1.02
        embedded = model.embed(tokens, jnp.array([[7, 9]]))
        expected = 8 * table[[7, 9]] + sinusoids(2, 64)
        np.testing.assert_allclose(embedded[0], expected, rtol=1e-5, atol=1e-6)


def test_dropout_is_of_training_alone(model):
    source, target = sentences([3, END], length=4), sentences([6, 7, END], length=3)
    first, second = (logits_of(model, source, target) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    model.train()
    first, second = (logits_of(model, source, target) for _ in range(2))
    model.eval()
    assert np.all(np.max(np.abs(first - second), axis=-1) > 1e-3)


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
    """Gives each token a probability by the two before it, of which one is cached."""

    def __init__(self, probabilities):
        self.log_p = nnx.Variable(jnp.log(jnp.asarray(probabilities)))

    def start(self, source, length):
        return source[:, 0]

    def step(self, tokens, position, cache):
        return self.log_p[...][cache, tokens], tokens


def random_chain(seed):
    return Chain(np.exp(np.random.default_rng(seed).normal(size=(5, 5, 5), scale=2)))


def score(model, tokens, length_penalty, source):
    log_p = np.asarray(nnx.log_softmax(model.log_p[...]), np.float64)
    history = source, END, *tokens
    steps = [log_p[x] for x in zip(history, history[1:], history[2:], strict=False)]
    return sum(steps) / len(tokens) ** length_penalty


def likeliest(model, length, length_penalty, source):
    """Of all sentences of up to ``length`` tokens, by trying each."""
    found = [
        [*body, END]
        for n in range(length)
        for body in itertools.product((2, 3, 4), repeat=n)
    ]
    return max(found, key=lambda x: score(model, x, length_penalty, source))


def as_lists(found):
    """Checks that each translation is closed by END, then PAD."""
    rows = np.asarray(found).tolist()
    ends = [row.index(END) for row in rows]
    for row, end in zip(rows, ends, strict=True):
        assert PAD not in row[:end]
        assert set(row[end + 1 :]) <= {PAD}
    return [row[: end + 1] for row, end in zip(rows, ends, strict=True)]


def test_beam_search_leaves_the_garden_path():
    # 2 is the likelier beginning, but nothing likely follows it.
    probabilities = np.full((5, 5, 5), 1e-6)
    probabilities[:, END, 2:] = 0.5, 0.4, 0.1
    probabilities[:, 2] = 1e-6, 0.28, 0.24, 0.24, 0.24
    probabilities[:, 3, 4] = 1.0
    probabilities[:, 4, END] = 1.0
    model, source = Chain(probabilities), np.array([[2], [3]], np.int32)
    assert as_lists(decoding.greedy_search(model, source, 4)) == [[2, END]] * 2
    assert as_lists(decoding.beam_search(model, source, 4, 3)) == [[3, 4, END]] * 2
    assert likeliest(model, 4, 1.0, 2) == [3, 4, END]


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_wide_beam_search_finds_the_likeliest(length_penalty):
    source = np.array([[2], [3], [4]], np.int32)
    lengths = set()
    for seed in range(5):
        model = random_chain(seed)
        # There are 40 sentences of up to 4 tokens.
        found = as_lists(decoding.beam_search(model, source, 4, 40, length_penalty))
        assert found == [likeliest(model, 4, length_penalty, x) for x in (2, 3, 4)]
        lengths |= set(map(len, found))
    assert len(lengths) > 1


def test_a_beam_of_one_is_greedy():
    source = np.array([[2], [3], [4]], np.int32)
    lengths = set()
    for seed in range(10):
        model = random_chain(seed)
        greedy = as_lists(decoding.greedy_search(model, source, 6))
        assert greedy == as_lists(decoding.beam_search(model, source, 6, 1))
        lengths |= set(map(len, greedy))
    assert {1, 6} < lengths  # some are stopped by the limit


def test_rows_that_only_fill_hold_no_search_up():
    probabilities = np.full((5, 5, 5), 1e-6)
    probabilities[2, END, END] = 1.0  # after source 2 nothing is written
    probabilities[PAD, END, 3] = probabilities[:, 3, 3] = 1.0  # after PAD ever more 3
    model, source = Chain(probabilities), np.array([[2], [PAD]], np.int32)
    for found in (
        decoding.greedy_search(model, source, 6),
        decoding.beam_search(model, source, 6, 1),
    ):
        assert np.asarray(found).tolist() == [[END] + [PAD] * 5, [PAD] * 6]


TINY = dataclasses.replace(
    translation.SIZES["laptop"],
    depth=1, width=8, hidden=8, heads=2, vocabulary=300, lengths=(24,), tokens=96,
    row_every=2, warmup=2,
)  # fmt: skip


@pytest.fixture
def tiny(pairs, monkeypatch):
    monkeypatch.setattr(data, "locale_pairs", lambda: pairs[:60])
    monkeypatch.setattr(
        translation, "laptop_pairs", lambda: data.laptop_pairs(held_out=6)
    )
    monkeypatch.setitem(translation.SIZES, "laptop", TINY)


@pytest.mark.usefixtures("tiny")
def test_command(tmp_path, capsys):
    options = translation.Options(steps=4, seeds=1, output=tmp_path)
    history = translation.main(options)
    names = ["Adam", "Adam, 2 steps of warm-up", "AdaMod, b3 0.99"]
    assert [run.optimizer for run in history] == names
    for rows in history.values():
        assert [row["step"] for row in rows] == [2, 4]
        for row in rows:
            assert all(0 <= row[x] <= 100 for x in translation.METRICS)
        # About the logarithm of the vocabulary, and learning.
        assert rows[0]["validation loss"] > rows[1]["validation loss"] > 3
    printed = capsys.readouterr().out
    assert "| AdaMod, b3 0.99 |" in printed
    assert "4, 0.0 horizons of 100" in printed
    for metric in translation.METRICS:
        assert f"{metric[0].upper()}{metric[1:]} after 4 steps" in printed
    output = tmp_path / "translation_laptop"
    with (output / "translation.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 3 * 2
    assert (output / "translation.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"runs with other settings: steps 4, now 6"):
        translation.main(dataclasses.replace(options, steps=6))


def test_evaluation_is_without_dropout(tokenizer, pairs, monkeypatch):
    encoded = data.within(data.encode(tokenizer, pairs[:300]), 24)
    corpus = translation.Corpus(tokenizer, encoded, encoded[:9], encoded[:3])
    task = translation.create_task(
        dataclasses.replace(TINY, lengths=(12, 24)), 1, corpus
    )
    model = nnx.jit(lambda: task.create_model(nnx.Rngs(0)))()
    sums = []

    def held_out_loss(model, batch):
        assert dropouts(model) == {True}
        tokens = np.sum(batch["target"] != PAD)
        sums.append((batch["target"].sum(), tokens))
        return batch["target"].sum() / tokens, tokens

    def search(model, source, *arguments):
        assert dropouts(model) == {True}
        return np.full_like(source, END)

    def dropouts(model):
        inside = model.encoder[0].fed.dropout, model.decoder[0].fed.dropout
        return {x.deterministic for x in (model.dropout, *inside)}

    assert dropouts(model) == {False}
    monkeypatch.setattr(translation, "held_out_loss", held_out_loss)
    monkeypatch.setattr(translation, "beam_search", search)
    monkeypatch.setattr(translation, "greedy_search", search)
    values = task.evaluate(model)
    # Every token counts the same, whatever batch it is in.
    total, tokens = np.sum(sums, axis=0)
    assert len(sums) > 1
    assert values["validation loss"] == pytest.approx(total / tokens)
    assert values["BLEU, greedy"] == 0


def test_bleu_is_that_of_the_texts(tokenizer, pairs):
    """What a search returns is scored as text, without the rows that only fill."""
    encoded = data.encode(tokenizer, pairs[:10])
    batches = data.held_out_batches(encoded, (16, 64), tokens=256)
    assert any(np.any(b["target"][:, 0] == PAD) for b in batches)
    by_source = {b["source"].tobytes(): b["target"] for b in batches}
    perfect = translation.bleu(lambda x, n: by_source[x.tobytes()], tokenizer, batches)
    assert perfect == pytest.approx(100)
    copied = translation.bleu(lambda x, n: x, tokenizer, batches)
    # In the order of the batches, which BLEU does not see.
    german, english = zip(*pairs[:10], strict=True)
    expected = sacrebleu.corpus_bleu(german, [english]).score
    assert copied == pytest.approx(expected)
    assert copied < 50


def test_schedules():
    size = dataclasses.replace(TINY, warmup=4)
    constant = translation.warmed_up(size, 1.0)
    np.testing.assert_allclose(
        [constant(i) for i in (0, 2, 4, 100)], [0.25, 0.625, 1, 1], rtol=1e-6
    )
    size = dataclasses.replace(size, after_warmup="inverse square root")
    falling = translation.warmed_up(size, 1.0)
    np.testing.assert_allclose(
        [falling(i) for i in (0, 2, 4, 16, 64)], [0.25, 0.625, 1, 0.5, 0.25], rtol=1e-6
    )


@pytest.mark.parametrize(
    ("nonsense", "message"),
    [
        ({"steps": 0}, "--steps must be at least 1, got 0"),
        ({"seeds": 0}, "--seeds must be at least 1, got 0"),
        ({"rates": (1e-3, -1.0)}, r"--rates must be positive, got \(0.001, -1.0\)"),
        ({"b3": 1.0}, r"--b3 must be in \[0, 1\), got 1.0"),
        ({"data": "x"}, "--data needs --size full"),
    ],
)
def test_nonsense_is_refused(nonsense, message):
    with pytest.raises(ValueError, match=message):
        translation.Options(**nonsense)


def test_full_size_is_the_papers():
    options = translation.Options(size="full")
    assert (options.rates, options.steps, options.b3) == ((5e-4,), 50_000, 0.9999)
    names = list(translation.optimizers(translation.SIZES["full"], 5e-4, 0.9999))
    assert names == ["Adam", "Adam, 4,000 steps of warm-up", "AdaMod, b3 0.9999"]
