"""Is the translator fairseq's Transformer, and does its search find the best?"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from experiments.data.translation import END, PAD
from experiments.models import decoding
from experiments.models.translator import (
    Translator,
    label_smoothed_loss,
    sinusoids,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")


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
    assert as_lists(decoding.beam_search(model, source, 4, 1)) == [[2, END]] * 2
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


def greedy(model, length, source):
    """Takes the likeliest token at every place, and END at the last."""
    log_p = np.asarray(model.log_p[...])
    tokens = [source, END]
    while len(tokens) < length + 1:
        tokens.append(1 + int(log_p[tokens[-2], tokens[-1], 1:].argmax()))
        if tokens[-1] == END:
            return tokens[2:]
    return [*tokens[2:], END]


def test_a_beam_of_one_is_greedy():
    source = np.array([[2], [3], [4]], np.int32)
    lengths = set()
    for seed in range(10):
        model = random_chain(seed)
        found = as_lists(decoding.beam_search(model, source, 6, 1))
        assert found == [greedy(model, 6, x) for x in (2, 3, 4)]
        lengths |= set(map(len, found))
    assert {1, 6} < lengths  # some are stopped by the limit


def test_rows_that_only_fill_hold_no_search_up():
    probabilities = np.full((5, 5, 5), 1e-6)
    probabilities[2, END, END] = 1.0  # after source 2 nothing is written
    probabilities[PAD, END, 3] = probabilities[:, 3, 3] = 1.0  # after PAD ever more 3
    model, source = Chain(probabilities), np.array([[2], [PAD]], np.int32)
    found = decoding.beam_search(model, source, 6, 1)
    assert np.asarray(found).tolist() == [[END] + [PAD] * 5, [PAD] * 6]
