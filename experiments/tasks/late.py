"""Tasks in which parameters start late: their gradient is exactly zero at first.

Behind a zero-initialised head, in zero-initialised residual branches and in LoRA they
start with the second step. Frozen blocks, late experts and new tokens start after a
third of the run, when every warm-up that is compared is over.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from examples.common.transformer import BYTES, Transformer
from experiments.common.comparison import GRID
from experiments.common.training import (
    Batch,
    Batches,
    Run,
    Task,
    compiled_step,
    initial_state,
)
from experiments.data.changes import Switching, Weighted
from experiments.data.text import batches, unigram_entropy
from experiments.tasks import text
from experiments.tasks.text import B2, CONTEXT, loss

BATCH = 8
LAST = 1 / 8  # of the run, over which the final loss is the mean
RANK = 4  # of LoRA
EXPERTS, LATE_EXPERTS = 4, 2  # in all, and those that no token reaches at first
RARE = 1.5  # by how much the router's logits of late experts are lowered afterwards
NEVER = 1e9  # the same where nothing may be chosen: its softmax is exactly 0
NEW = 256  # tokens, each the pair of bytes that is the next most common
GATE = "weight"  # of a batch: 0 before late starters may start, then 1


@dataclasses.dataclass(frozen=True)
class Size:
    """What makes all tasks smaller, for a trial or a test."""

    steps: int = 400
    """Training steps of a run."""
    depth: int = 4
    """Transformer blocks."""
    width: int = 64
    """Features, a multiple of 4."""
    pretraining: int = 600
    """Steps of the model that is fine-tuned."""

    @property
    def start(self) -> int:
        """The step before which the gradients of late starters are zero."""
        return self.steps // 3


@dataclasses.dataclass(frozen=True)
class Late:
    """A task of late starters.

    Attributes:
      task: What is trained.
      plateau: The loss of a model that only knows how common each token is.
      rates: The learning rates of every optimizer.
      b3: Of AdaMod and of the exponential warm-up.
      seeds: At most so many.
    """

    task: Task
    plateau: float
    rates: tuple[float, ...] = GRID
    b3: float = 0.99
    seeds: int = 5


def python_text() -> np.ndarray:
    return text.python_text(BATCH)


def c_text() -> np.ndarray:
    return text.c_text(BATCH)


def model_of(size: Size, **options: Any) -> Callable[[nnx.Rngs], Transformer]:
    return text.model_of(size.depth, size.width, **options)


def gated(size: Size, batches: Batches) -> Batches:
    return Weighted(batches, lambda step: float(step >= size.start))


def of_text(
    size: Size,
    found: np.ndarray,
    create_model: Callable[[nnx.Rngs], nnx.Module],
    loss: Callable[[nnx.Module, Batch], jax.Array] = loss,
    change: Callable[[Batches, int], Batches] = lambda batches, seed: batches,  # noqa: ARG005
    **options: Any,
) -> Late:
    """Returns a task whose batches are windows of the text, with a gate."""
    task = text.task_of(
        create_model, size.steps, max(1, round(LAST * size.steps)), BATCH, found, loss,
        lambda batches, seed: gated(size, change(batches, seed)),
    )  # fmt: skip
    return Late(task, unigram_entropy(found), **options)


def zero_head(size: Size) -> Late:
    """Everything behind the head of zeros starts with the second step."""

    def create(rngs: nnx.Rngs) -> Transformer:
        model = model_of(size)(rngs)
        model.logits.kernel[...] = jnp.zeros_like(model.logits.kernel[...])
        return model

    # All fail at smaller rates than elsewhere, and not all seeds at the same.
    rates = (5e-4, 1e-3, 1.5e-3, 2e-3, 4e-3)
    return of_text(size, python_text(), create, rates=rates)


def zero_branches(size: Size) -> Late:
    """What stands before the last layer of each residual branch starts second."""
    return of_text(size, python_text(), model_of(size, variance=0.0))


@functools.cache
def trained(size: Size) -> dict[Any, Any]:
    """Returns the parameters of a model of Python's bytes, of one seed for all runs."""
    warmed_up = optax.warmup_cosine_decay_schedule(
        0, 2e-3, size.pretraining // 6, size.pretraining
    )
    run = Run("Adam", optax.adam(warmed_up, b2=B2), 2e-3, seed=1000)
    task = of_text(size, python_text(), model_of(size)).task
    state = initial_state(task, run)
    step = compiled_step(task, run.transformation.update)
    windows = task.batches(run.seed)
    for index in range(size.pretraining):
        state, _ = step(state, windows[index])
    return jax.device_get(state.params)


def fine_tuned(size: Size) -> Callable[[nnx.Rngs], Transformer]:
    """Returns what makes the trained model, which has no room for a seed."""
    found = trained(size)

    def create(rngs: nnx.Rngs) -> Transformer:
        model = model_of(size)(rngs)
        state = nnx.state(model, nnx.Param)
        nnx.replace_by_pure_dict(state, found)
        nnx.update(model, state)
        return model

    return create


class Adapted(nnx.Module):
    """A linear layer beside which a product of low rank is trained, at first 0."""

    def __init__(self, inner: Any, *, rngs: nnx.Rngs):
        features, *outputs = inner.kernel.shape
        self.inner = inner
        scale = features**-0.5
        a = scale * jax.random.normal(rngs.params(), (features, RANK))
        self.a = nnx.LoRAParam(a)
        self.b = nnx.LoRAParam(jnp.zeros((RANK, *outputs)))

    def __call__(self, x: jax.Array, **options: Any) -> jax.Array:
        low = jnp.tensordot(x @ self.a[...], self.b[...], 1)
        return self.inner(x, **options) + low


def lora(size: Size) -> Late:
    """The trained model on C; its A starts when B has left zero, after one step."""
    create_base = fine_tuned(size)

    def create(rngs: nnx.Rngs) -> Transformer:
        model: Any = create_base(rngs)
        for block in model.blocks:
            for name in ("query", "value"):
                layer = Adapted(getattr(block.attention, name), rngs=rngs)
                setattr(block.attention, name, layer)
            block.expand = Adapted(block.expand, rngs=rngs)
            block.contract = Adapted(block.contract, rngs=rngs)
        for _, module in nnx.iter_modules(model):
            for name, x in list(vars(module).items()):
                if type(x) is nnx.Param:  # not the adapters', of a type of their own
                    setattr(module, name, nnx.Variable(x[...]))
        return model

    # The updates of a product of two small matrices may be larger.
    rates = (2e-3, 5e-3, 1e-2, 3e-2, 1e-1)
    return of_text(size, c_text(), create, rates=rates)


def full_fine_tuning(size: Size) -> Late:
    """The trained model on C, all of it: nothing starts late but bytes unseen."""
    return of_text(size, c_text(), fine_tuned(size))


def frozen_loss(model: Any, batch: Batch) -> jax.Array:
    """Returns the loss, which the lower half of the blocks sees through the gate."""
    for block in list(model.blocks)[: len(model.blocks) // 2]:
        state = nnx.state(block, nnx.Param)
        nnx.update(block, jax.tree.map(lambda x: gate(x, batch[GATE]), state))
    return loss(model, batch)


def gate(x: jax.Array, weight: Any) -> jax.Array:
    """Returns the same number, whose gradient is multiplied by the weight."""
    held = jax.lax.stop_gradient(x)
    return held + weight * (x - held)


def frozen(size: Size, **options: Any) -> Late:
    """The lower half of the blocks is frozen for a third of the run."""
    return of_text(size, python_text(), model_of(size), frozen_loss, **options)


class Routed(nnx.Module):
    """The first layer of as many experts side by side, times the router's choice.

    One expert is chosen for each token, as in a Switch Transformer. The gate may stand
    before the ReLU, for it is not negative, so one layer can follow for all experts.
    """

    def __init__(self, width: int, hidden: int, *, rngs: nnx.Rngs):
        self.router = nnx.Linear(width, EXPERTS, use_bias=False, rngs=rngs)
        self.experts = nnx.Linear(width, EXPERTS * hidden, rngs=rngs)
        self.lowered = nnx.Variable(jnp.float32(RARE))  # of late experts

    def __call__(self, x: jax.Array) -> jax.Array:
        late = jnp.arange(EXPERTS) >= EXPERTS - LATE_EXPERTS
        lowered = jnp.where(late, self.lowered[...], 0)
        logits = self.router(x) - jnp.broadcast_to(lowered, (*x.shape[:-1], EXPERTS))
        chosen = jax.nn.one_hot(jnp.argmax(logits, axis=-1), EXPERTS)
        weight = jax.nn.softmax(logits) * chosen
        hidden = self.experts(x).reshape(*x.shape[:-1], EXPERTS, -1)
        return (weight[..., None] * hidden).reshape(*x.shape[:-1], -1)


def routed_loss(model: Any, batch: Batch) -> jax.Array:
    for block in model.blocks:
        block.expand.lowered[...] = jnp.where(batch[GATE] > 0, RARE, NEVER)
    return loss(model, batch)


def experts(size: Size) -> Late:
    """Two of four experts are open to no token at first, and to few afterwards."""

    def create(rngs: nnx.Rngs) -> Transformer:
        model: Any = model_of(size)(rngs)
        hidden = 2 * size.width
        for block in model.blocks:
            block.expand = Routed(size.width, hidden, rngs=rngs)
            block.contract = nnx.Linear(EXPERTS * hidden, size.width, rngs=rngs)
        return model

    return of_text(size, python_text(), create, routed_loss)


def with_pairs(text: np.ndarray) -> np.ndarray:
    """Returns the text with its most common pairs of bytes as tokens from 256 on."""
    pairs = text[: len(text) // 2 * 2].reshape(-1, 2).astype(np.int32)
    number = pairs[:, 0] * BYTES + pairs[:, 1]
    common = np.argsort(-np.bincount(number, minlength=BYTES**2), kind="stable")[:NEW]
    token = np.full(BYTES**2, -1)
    token[common] = BYTES + np.arange(NEW)
    merged = token[number]
    both = np.where(merged[:, None] >= 0, merged[:, None], pairs)
    kept = np.stack([np.full(len(merged), True), merged < 0], axis=1)
    return both[kept].astype(np.int32)


def extended_loss(model: Any, batch: Batch) -> jax.Array:
    """Returns the loss; before the gate opens no new token can be predicted."""
    windows = jnp.asarray(batch["tokens"])
    logits = model(windows[:, :-1])
    new = jnp.broadcast_to(jnp.arange(logits.shape[-1]) >= BYTES, logits.shape)
    shut = new & (batch[GATE] == 0)
    return optax.softmax_cross_entropy_with_integer_labels(
        jnp.where(shut, -NEVER, logits), windows[:, 1:]
    ).mean()


def new_tokens(size: Size) -> Late:
    """The trained model reads bytes for a third of the run, then pairs of them too."""
    found = trained(size)

    def create(rngs: nnx.Rngs) -> Transformer:
        model = model_of(size, vocabulary=BYTES + NEW)(rngs)
        state = nnx.state(model, nnx.Param)
        pure: Any = nnx.to_pure_dict(state)
        extended = jax.tree.map(extend, found, pure)
        nnx.replace_by_pure_dict(state, extended)
        nnx.update(model, state)
        return model

    plain = python_text()
    before = ((0, size.start),)
    return of_text(
        size, with_pairs(plain), create, extended_loss,
        lambda paired, seed: Switching(
            paired, batches(plain, CONTEXT, seed, BATCH), before
        ),
    )  # fmt: skip


def extend(old: Any, new: jax.Array) -> jax.Array:
    """Returns the old numbers, and the new ones where there were none."""
    return new.at[tuple(slice(0, n) for n in old.shape)].set(old)


TASKS: dict[str, Callable[[Size], Late]] = {
    "zero_head": zero_head,
    "zero_branches": zero_branches,
    "lora": lora,
    "full_fine_tuning": full_fine_tuning,
    "frozen": frozen,
    "experts": experts,
    "new_tokens": new_tokens,
    "frozen_long": lambda size: frozen(
        dataclasses.replace(size, steps=4 * size.steps), b3=0.999, seeds=3
    ),
}
