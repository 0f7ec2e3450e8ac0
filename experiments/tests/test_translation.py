"""Is the translation experiment sound: its data, its evaluation, its command?"""

import csv
import dataclasses
import itertools
import json

import chex
import datasets
import huggingface_hub
import numpy as np
import pytest
import sacrebleu
from flax import nnx

from experiments import translation
from experiments.data import translation as data
from experiments.data.locale_pairs import locale_pairs
from experiments.tasks import translation as tasks

END, PAD = data.END, data.PAD


@pytest.fixture(scope="module")
def pairs():
    return locale_pairs()


@pytest.fixture(scope="module")
def tokenizer(pairs):
    return data.train_tokenizer(pairs[:2000], 400)


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


TINY = dataclasses.replace(
    tasks.SIZES["laptop"],
    depth=1, width=8, hidden=8, heads=2, vocabulary=300, lengths=(24,), tokens=96,
    row_every=2, warmup=2, steps=4,
)  # fmt: skip


@pytest.fixture
def tiny(pairs, monkeypatch):
    monkeypatch.setattr(data, "locale_pairs", lambda: pairs[:60])
    monkeypatch.setattr(
        translation, "laptop_pairs", lambda: data.laptop_pairs(held_out=6)
    )
    monkeypatch.setitem(tasks.SIZES, "laptop", TINY)


@pytest.mark.usefixtures("tiny", "quick_compilation")
def test_command(tmp_path, capsys, monkeypatch):
    options = translation.Options(seeds=1, output=tmp_path)
    history = translation.main(options)
    names = ["Adam", "Adam, 2 steps of warm-up", "AdaMod, b3 0.99"]
    assert [run.optimizer for run in history] == names
    for rows in history.values():
        assert [row["step"] for row in rows] == [2, 4]
        for row in rows:
            assert all(0 <= row[x] <= 100 for x in tasks.METRICS)
        # About the logarithm of the vocabulary, and learning.
        assert rows[0]["validation loss"] > rows[1]["validation loss"] > 3
    printed = capsys.readouterr().out
    assert "| AdaMod, b3 0.99 |" in printed
    assert "4, 0.0 horizons of 100" in printed
    for metric in tasks.METRICS:
        assert f"{metric[0].upper()}{metric[1:]} after 4 steps" in printed
    output = tmp_path / "translation_laptop"
    with (output / "translation.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 3
    longer = dataclasses.replace(TINY, steps=6)
    monkeypatch.setitem(tasks.SIZES, "laptop", longer)
    with pytest.raises(ValueError, match=r"runs with other settings: steps 4, now 6"):
        translation.main(options)


def test_evaluation_is_without_dropout(tokenizer, pairs, monkeypatch):
    encoded = data.within(data.encode(tokenizer, pairs[:300]), 24)
    corpus = tasks.Corpus(tokenizer, encoded, encoded[:9], encoded[:3])
    task = tasks.task_of(dataclasses.replace(TINY, lengths=(12, 24)), corpus)
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
    monkeypatch.setattr(tasks, "held_out_loss", held_out_loss)
    monkeypatch.setattr(tasks, "beam_search", search)
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
    perfect = tasks.bleu(lambda x, n: by_source[x.tobytes()], tokenizer, batches)
    assert perfect == pytest.approx(100)
    copied = tasks.bleu(lambda x, n: x, tokenizer, batches)
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
        ({"seeds": 0}, "--seeds must be at least 1, got 0"),
        ({"rates": (1e-3, -1.0)}, r"--rates must be positive, got \(0.001, -1.0\)"),
        ({"data": "x"}, "--data needs --size full"),
    ],
)
def test_nonsense_is_refused(nonsense, message):
    with pytest.raises(ValueError, match=message):
        translation.Options(**nonsense)


def test_full_size_is_the_papers():
    options = translation.Options(size="full")
    size = tasks.SIZES["full"]
    assert (options.rates, size.steps, size.b3) == ((5e-4,), 50_000, 0.9999)
    names = list(translation.optimizers(size, 5e-4))
    assert names == ["Adam", "Adam, 4,000 steps of warm-up", "AdaMod, b3 0.9999"]
