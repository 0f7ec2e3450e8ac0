"""Python source as words: its tokens, and strings and comments by word and sign."""

import dataclasses
import re
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

BLOCK = 1000  # words in a row, all of them to train or all to validate
HELD_OUT = 20  # of so many blocks, one
PROSE = {tokenize.STRING, tokenize.COMMENT}
LAYOUT = {tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
LEFT_OUT = {tokenize.ENCODING, tokenize.NL, tokenize.ENDMARKER}


@dataclasses.dataclass(frozen=True)
class Words:
    """A text as numbers, the most common word 0; the last one is all others'."""

    train: np.ndarray  # int32[N]
    validation: np.ndarray  # int32[M]


def load_words(folder: Path, at_least: int, vocabulary: int) -> Words:
    """Returns the words of the folder's Python files, end to end.

    Raises:
      ValueError: The files hold fewer than ``at_least`` words to train or to validate.
    """
    words = [x for path in sorted(folder.glob("*.py")) for x in words_of(path)]
    if len(words) < (needed := HELD_OUT * max(at_least, BLOCK)):
        raise ValueError(
            f"the .py files in {folder} hold {len(words)} words, and {needed} are "
            "needed."
        )
    common = [word for word, _ in Counter(words).most_common(vocabulary - 1)]
    index = {word: i for i, word in enumerate(common)}
    text = np.array([index.get(word, vocabulary - 1) for word in words], np.int32)
    held_out = np.arange(len(text)) // BLOCK % HELD_OUT == HELD_OUT - 1
    return Words(text[~held_out], text[held_out])


def words_of(path: Path) -> Iterator[str]:
    """Yields Python's tokens; strings and comments by word and sign."""
    with path.open("rb") as file:
        for token in tokenize.tokenize(file.readline):
            if token.type in PROSE:
                yield from re.findall(r"\w+|[^\w\s]", token.string)
            elif token.type in LAYOUT:
                yield tokenize.tok_name[token.type]
            elif token.type not in LEFT_OUT:
                yield token.string
