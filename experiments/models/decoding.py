"""Beam search, jitted, over anything that starts and steps a cache."""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.data.translation import END, PAD

NEVER = -1e9  # a log-probability; finite, so that sums of it are numbers


class Decoder(Protocol):
    """What is searched: see Translator."""

    def start(self, source: jax.typing.ArrayLike, length: int) -> Any: ...

    def step(
        self, tokens: jax.Array, position: jax.Array, cache: Any
    ) -> tuple[jax.Array, Any]: ...


class _Beam(NamedTuple):
    """The state of the search, by sentence and hypothesis."""

    position: jax.Array  # int32[]
    tokens: jax.Array  # int32[batch, beam, length], still being written
    scores: jax.Array  # float32[batch, beam], their log-probabilities
    cache: Any  # its arrays are of [batch * beam, ...]
    found: jax.Array  # int32[batch, beam, length], closed by END
    found_scores: jax.Array  # float32[batch, beam], with the length penalty
    number_found: jax.Array  # int32[batch]


def _log_probabilities(logits: jax.Array, last: jax.Array) -> jax.Array:
    """Of tokens that may follow: never PAD, and nothing but END at the last place."""
    log_p = nnx.log_softmax(logits).at[:, PAD].set(NEVER)
    is_end = jnp.arange(log_p.shape[-1])[None] == END
    return jnp.where(last & ~is_end, NEVER, log_p)


@nnx.jit(static_argnames=("length", "beam"))
def beam_search(
    model: Decoder,
    source: jax.typing.ArrayLike,
    length: int,
    beam: int,
    length_penalty: jax.typing.ArrayLike = 1.0,
) -> jax.Array:
    """Returns the best of the translations that a beam search finds.

    As in fairseq, a hypothesis is finished when it is among the ``beam`` best of its
    step and closed by END, its score is the log-probability divided by its length
    to the power of ``length_penalty``, and a sentence is done after ``beam`` of them.

    Args:
      model: In evaluation mode.
      source: int32[batch, source length].
      length: The most tokens of a translation, END included.
      beam: Hypotheses kept for each sentence; with 1 it is greedy search.
      length_penalty: Above 0 favours longer translations.

    Returns:
      int32[batch, length], closed by END, then PAD; of a source that is nothing but
      PAD, PAD.
    """
    rows = jnp.shape(source)[0]

    def spread(x: jax.Array) -> jax.Array:
        return jnp.repeat(x, beam, axis=0)

    def unfinished(state: _Beam) -> jax.Array:
        return (state.position < length) & jnp.any(state.number_found < beam)

    def write(state: _Beam) -> _Beam:
        before = state.tokens[:, :, jnp.maximum(state.position - 1, 0)]
        last = jnp.where(state.position == 0, END, before)
        logits, cache = model.step(last.reshape(-1), state.position, state.cache)
        log_p = _log_probabilities(logits, state.position == length - 1)
        totals = state.scores[:, :, None] + log_p.reshape(rows, beam, -1)
        vocabulary = totals.shape[-1]
        # Twice as many as needed, since at most one per hypothesis is closed by END.
        scores, places = jax.lax.top_k(totals.reshape(rows, -1), 2 * beam)
        origins, chosen = places // vocabulary, places % vocabulary
        tokens = _take(state.tokens, origins).at[:, :, state.position].set(chosen)
        ended = chosen == END

        finished = ended & (jnp.arange(2 * beam) < beam)[None] & (scores > NEVER / 2)
        finished &= (state.number_found < beam)[:, None]
        penalised = scores / (state.position + 1) ** length_penalty
        candidates = jnp.where(finished, penalised, -jnp.inf)
        found_scores, best = jax.lax.top_k(
            jnp.concatenate([state.found_scores, candidates], axis=1), beam
        )
        found = _take(jnp.concatenate([state.found, tokens], axis=1), best)

        scores, alive = jax.lax.top_k(jnp.where(ended, 2 * NEVER, scores), beam)
        origins = jnp.take_along_axis(origins, alive, axis=1)
        rows_of = (jnp.arange(rows)[:, None] * beam + origins).reshape(-1)
        return _Beam(
            position=state.position + 1,
            tokens=_take(tokens, alive),
            scores=scores,
            cache=jax.tree.map(lambda x: x[rows_of], cache),
            found=found,
            found_scores=found_scores,
            number_found=state.number_found + finished.sum(axis=1),
        )

    nothing = jnp.full((rows, beam, length), PAD)
    end = jax.lax.while_loop(
        unfinished,
        write,
        _Beam(
            position=jnp.int32(0),
            tokens=nothing,
            # All hypotheses begin alike, so all but one have to wait.
            scores=jnp.where(jnp.arange(beam) == 0, 0.0, NEVER)[None].repeat(rows, 0),
            cache=jax.tree.map(spread, model.start(source, length)),
            found=nothing,
            found_scores=jnp.full((rows, beam), -jnp.inf),
            # Rows that only fill are done.
            number_found=jnp.where(jnp.asarray(source)[:, 0] == PAD, beam, 0),
        ),
    )
    return end.found[:, 0]


def _take(x: jax.Array, places: jax.Array) -> jax.Array:
    """Returns the hypotheses at ``places``: [batch, chosen, length]."""
    return jnp.take_along_axis(x, places[:, :, None], axis=1)
