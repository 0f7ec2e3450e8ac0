"""The optimizers that are compared everywhere: AdaMod and its rivals."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_adamod import ScaleByAdamodState, scale_by_adamod

B1, B3, EPS = 0.9, 0.99, 1e-8
TUNED = (50, 200, 400)  # steps, of the warm-ups of which the best one counts

Scale = Callable[[float, optax.Schedule], optax.GradientTransformation]
Warmup = Callable[[float, Any], Any]  # of b2 and the count
Creates = Callable[[jax.typing.ArrayLike], optax.GradientTransformation]


@dataclasses.dataclass(frozen=True)
class Contestant:
    """An optimizer.

    Attributes:
      scale: Makes its updates per unit of learning rate, from ``b2`` and the schedule.
      warmup: The factor of the learning rate at a count.
      b3: Of AdaMod.
      at_jumps: Whether it warms up again whenever the learning rate jumps.
      tuned: Whether it counts as one of several lengths, of which the best is taken.
    """

    scale: Scale
    warmup: Warmup = lambda b2, count: 1.0  # noqa: ARG005
    b3: float | None = None
    at_jumps: bool = False
    tuned: bool = False


def adam(b2: float, learning_rate: optax.Schedule) -> optax.GradientTransformation:
    del learning_rate
    return optax.scale_by_adam(B1, b2, EPS)


def radam(b2: float, learning_rate: optax.Schedule) -> optax.GradientTransformation:
    del learning_rate
    return optax.scale_by_radam(B1, b2, EPS)


def amsgrad(b2: float, learning_rate: optax.Schedule) -> optax.GradientTransformation:
    del learning_rate
    return optax.scale_by_amsgrad(B1, b2, EPS)


def untuned_linear(b2: float, count: Any) -> Any:
    """Ma and Yarats's linear warm-up, over 2 / (1 - b2) steps."""
    return jnp.minimum(1, (count + 1) * (1 - b2) / 2)


def untuned_exponential(b2: float, count: Any) -> Any:
    """Theirs that is exponential."""
    return 1 - b2 ** (count + 1)


def linear(steps: int) -> Warmup:
    return lambda b2, count: jnp.minimum(1, (count + 1) / steps)  # noqa: ARG005


def exponential(b3: float) -> Warmup:
    """What AdaMod's bound does to steady rates."""
    return lambda b2, count: untuned_exponential(b3, count)  # noqa: ARG005


def adamod(b3: float) -> Contestant:
    return Contestant(
        lambda b2, learning_rate: scale_by_adamod(
            B1, b2, b3, EPS, bound_learning_rate=learning_rate
        ),
        b3=b3,
    )


def plain_adamod(b3: float, *, rule: bool) -> Contestant:
    """AdaMod for a constant learning rate, by the same arithmetic with the rule."""
    return Contestant(
        lambda b2, _: scale_by_plain_adamod(B1, b2, b3, EPS, rule=rule), b3=b3
    )


def scale_by_plain_adamod(
    b1: float, b2: float, b3: float, eps: float, *, rule: bool
) -> optax.GradientTransformation:
    """Returns AdaMod, per unit of a constant learning rate.

    As published, the bound averages ``1 / eps`` while a second moment is exactly 0, so
    before a coordinate's first gradient. With the rule it counts these rates as 0.
    """

    def init_fn(params: optax.Params) -> ScaleByAdamodState:
        averages = (optax.tree.zeros_like(params) for _ in range(3))
        return ScaleByAdamodState(jnp.zeros([], jnp.int32), *averages)

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, ScaleByAdamodState]:
        del params
        count = optax.safe_increment(state.count)
        m_opened, v_opened = (
            -jnp.expm1(jnp.multiply(count, jnp.log(b))) for b in (b1, b2)
        )

        def leaf(
            g: jax.Array, m: jax.Array, v_hat: jax.Array, s: jax.Array
        ) -> tuple[jax.Array, ...]:
            m += (1 - b1) * (g - m)
            v_hat += (1 - b2) / v_opened * (g**2 - v_hat)
            eta = 1 / (jnp.sqrt(v_hat) + eps)
            s += (1 - b3) * ((jnp.where(v_hat > 0, eta, 0) if rule else eta) - s)
            return jnp.minimum(eta, s) * (m / m_opened), m, v_hat, s

        leaves = jax.tree.map(leaf, updates, state.mu, state.nu, state.bound)
        updates, *averages = jax.tree.transpose(
            jax.tree.structure(updates), None, leaves
        )
        return updates, ScaleByAdamodState(count, *averages)

    return optax.GradientTransformation(init_fn, update_fn)


# In the order in which they are trained.
CONTESTANTS = {
    "Adam, linear warm-up over 2/(1-b2)": Contestant(adam, untuned_linear),
    f"AdaMod, b3 {B3:g}": adamod(B3),
    f"Adam, exponential warm-up, b3 {B3:g}": Contestant(adam, exponential(B3)),
    "Adam": Contestant(adam),
    "RAdam": Contestant(radam),
    "AMSGrad": Contestant(amsgrad),
    "Adam, exponential warm-up, b2": Contestant(adam, untuned_exponential),
    **{
        f"Adam, linear warm-up over {steps}": Contestant(
            adam, linear(steps), tuned=True
        )
        for steps in TUNED
    },
    "Adam, linear warm-up at every jump": Contestant(
        adam, untuned_linear, at_jumps=True
    ),
    "AdaMod, b3 0.999": adamod(0.999),
}


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How a task trains, whoever the contestant is.

    Attributes:
      b2: Decay rate of the second moment.
      shape: The factor of the learning rate at a count, before any warm-up.
      since_jump: The count since the learning rate last jumped up, if it jumps.
      weight_decay: Decoupled.
      forgets_at: The count at which the optimizer's state is lost, as by a run that is
        resumed from its parameters alone.
    """

    b2: float
    shape: Callable[[Any], Any] = lambda count: 1.0  # noqa: ARG005
    since_jump: Callable[[Any], Any] | None = None
    weight_decay: float = 0.0
    forgets_at: int | None = None


def create(contestant: Contestant, schedule: Schedule) -> Creates:
    """Returns what makes the contestant's optimizer from a learning rate."""

    def at(learning_rate: jax.typing.ArrayLike) -> optax.GradientTransformation:
        def steps(count: Any) -> Any:
            since = count
            if contestant.at_jumps and schedule.since_jump is not None:
                since = schedule.since_jump(count)
            warmed_up = contestant.warmup(schedule.b2, since)
            return learning_rate * schedule.shape(count) * warmed_up

        tx = optax.chain(
            contestant.scale(schedule.b2, steps),
            optax.add_decayed_weights(schedule.weight_decay),
            optax.scale_by_learning_rate(steps),
        )
        if schedule.forgets_at is not None:
            tx = forgetful(tx, schedule.forgets_at)
        return tx

    return at


class ForgetfulState(NamedTuple):
    """The step, which is not lost, and what is."""

    step: jax.Array
    inner: Any


def forgetful(
    tx: optax.GradientTransformation, at: int
) -> optax.GradientTransformation:
    """Returns the optimizer with its state lost once, before the step ``at``."""

    def init_fn(params: optax.Params) -> ForgetfulState:
        return ForgetfulState(jnp.zeros([], jnp.int32), tx.init(params))

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, ForgetfulState]:
        assert params is not None
        lost = state.step == at
        inner = jax.tree.map(
            lambda new, old: jnp.where(lost, new, old), tx.init(params), state.inner
        )
        updates, inner = tx.update(updates, inner, params)
        return updates, ForgetfulState(state.step + 1, inner)

    return optax.GradientTransformation(init_fn, update_fn)


class AtRateState(NamedTuple):
    """The learning rate, and the optimizer's own state."""

    learning_rate: jax.Array
    inner: Any


def at_rate(creates: Creates, learning_rate: float) -> optax.GradientTransformation:
    """Returns the optimizer with its learning rate in the state.

    So all learning rates share one compiled step.
    """

    def init_fn(params: optax.Params) -> AtRateState:
        inner = creates(learning_rate).init(params)
        return AtRateState(jnp.asarray(learning_rate, jnp.float32), inner)

    return optax.GradientTransformation(init_fn, _update_of(creates))


@functools.cache
def _update_of(creates: Creates) -> optax.TransformUpdateFn:
    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, AtRateState]:
        tx = creates(state.learning_rate)
        updates, inner = tx.update(updates, state.inner, params)
        return updates, AtRateState(state.learning_rate, inner)

    return update_fn
