"""Are the words of Python's source, and the loss of what is held out, as they say?"""

import math

import jax
import numpy as np
import pytest
from flax import nnx

from experiments.data.words import load_words, words_of
from experiments.tasks.words import validate

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
    (tmp_path / "a.py").write_text("a\n" * 8999 + "b c\n" * 334)
    (tmp_path / "b.py").write_text("b\n" * 500)
    return tmp_path


def test_words_held_out(folder):
    words = load_words(folder, at_least=10, vocabulary=4)  # NEWLINE, a, b and c
    assert (len(words.train), len(words.validation)) == (19_000, 1000)
    np.testing.assert_array_equal(words.validation, [2, 0] * 500)
    assert np.bincount(words.train).tolist() == [9333, 8999, 334, 334]
    fewer = load_words(folder, at_least=10, vocabulary=3)
    np.testing.assert_array_equal(fewer.train, np.minimum(words.train, 2))


def test_too_few_words(folder):
    with pytest.raises(ValueError, match=r"hold 20000 words, and 40000 are needed"):
        load_words(folder, at_least=2000, vocabulary=4)


class Echo(nnx.Module):
    """Is rather sure that a NEWLINE is followed by another, and of nothing else."""

    def __call__(self, tokens):
        return 2.0 * jax.nn.one_hot(tokens, 4) * (tokens == 0)[..., None]


def test_the_loss_is_of_words_held_out(folder):
    words = load_words(folder, at_least=10, vocabulary=4)
    after_newline, after_b = math.log(3 + math.e**2), math.log(4)  # they take turns
    loss = validate(Echo(), words, context=4)
    assert loss == pytest.approx((after_newline + after_b) / 2, rel=1e-5)
