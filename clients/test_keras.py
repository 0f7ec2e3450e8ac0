"""Does an adapter of 30 lines train, schedule and save in Keras on JAX?"""

import chex
import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
import pytest

from clients.keras_optimizer import AdaMod
from optax_adamod import adamod

pytestmark = pytest.mark.clients
X = np.linspace(-2.0, 2.0, 64, dtype=np.float32)[:, None]
Y = np.sin(3 * X)


def new_model(optimizer):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((1,)),
            keras.layers.Dense(32, "tanh"),
            keras.layers.Dense(32, "tanh"),
            keras.layers.Dense(1),
        ]
    )
    model.compile(optimizer, "mse")
    return model


def losses(model, epochs):
    fitted = model.fit(
        X, Y, batch_size=64, shuffle=False, epochs=epochs, verbose=0,
    )  # fmt: skip
    return fitted.history["loss"]


def test_it_learns_a_sine_with_keras_schedule(monkeypatch):
    traces = []
    step = AdaMod.update_step
    monkeypatch.setattr(
        AdaMod, "update_step", lambda *args: (traces.append(1), step(*args))[1]
    )
    schedule = keras.optimizers.schedules.CosineDecay(0.02, 600)
    found = losses(new_model(AdaMod(schedule, b3=0.9)), 600)
    adams = losses(new_model(keras.optimizers.Adam(schedule)), 600)
    assert found[-1] < 5e-3 < 0.1 < found[0]
    assert found[-1] < 2 * adams[-1]
    assert len(traces) == 6  # one for each kernel and bias


def test_nearly_without_a_bound_it_is_keras_adam():
    """With b3 at 1e-3 the bound is 0.1 % behind Adam's rates in the first step."""
    ours = losses(new_model(AdaMod(1e-3, b3=1e-3)), 10)
    adams = losses(new_model(keras.optimizers.Adam(1e-3, epsilon=1e-8)), 10)
    np.testing.assert_allclose(ours, adams, rtol=2e-3)
    assert adams[-1] < 0.99 * adams[0]


def test_it_is_the_transformation():
    """With Keras's losses and gradients, and Optax's loop around them."""
    model = new_model(AdaMod(0.02, b3=0.9))
    start = [jnp.array(v.value) for v in model.trainable_variables]  # Keras donates
    found = losses(model, 10)
    tx = adamod(0.02, b3=0.9)

    def loss(params):
        y, _ = model.stateless_call(params, model.non_trainable_variables, X)
        return jnp.mean((y - Y) ** 2)

    @jax.jit
    def step(params, state):
        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = tx.update(gradients, state, params)
        return value, optax.apply_updates(params, updates), state

    params, state, expected = start, tx.init(start), []
    for _ in range(10):
        value, params, state = step(params, state)
        expected.append(float(value))
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    for kept, average in zip(model.optimizer.averages, state[0][1:], strict=True):
        chex.assert_trees_all_close(
            [np.asarray(v.value) for v in kept], average, rtol=1e-2, atol=1e-5
        )


def test_a_saved_model_goes_on(tmp_path):
    model = new_model(AdaMod(0.02, b3=0.9))
    losses(model, 5)
    model.save(tmp_path / "model.keras")
    restored = keras.models.load_model(tmp_path / "model.keras")
    assert restored.optimizer.b3 == 0.9
    np.testing.assert_array_equal(losses(restored, 5), losses(model, 5))
