"""Does NetKet find the exact energy of a spin chain, with complex parameters?"""

import chex
import flax.serialization
import jax
import netket as nk
import numpy as np
import optax
import pytest

from clients.counting import counted
from optax_adamod import adamod, learning_rates

pytestmark = [pytest.mark.clients, pytest.mark.usefixtures("x64")]


def chain():
    space = nk.hilbert.Spin(0.5, 4)
    return nk.operator.Ising(space, nk.graph.Chain(4), h=1.0)


def driver(tx, reconfiguration):
    hamiltonian = chain()
    state = nk.vqs.FullSumState(
        hamiltonian.hilbert, nk.models.RBM(alpha=2, param_dtype=complex), seed=1
    )
    options = {}
    if reconfiguration:
        options["preconditioner"] = nk.optimizer.SR(diag_shift=0.01, holomorphic=True)
    return nk.driver.VMC(hamiltonian, tx, variational_state=state, **options)


def energies(vmc, steps):
    log = nk.logging.RuntimeLog()
    vmc.run(steps, out=log, show_progress=False)
    return np.real(log.data["Energy"]["Mean"])


@pytest.mark.parametrize("reconfiguration", [False, True])
def test_the_exact_energy(reconfiguration):
    (exact,) = nk.exact.lanczos_ed(chain())
    tx, traces = counted(adamod(0.03, b3=0.9))
    vmc = driver(tx, reconfiguration)
    found = energies(vmc, 300)
    assert found[0] > 0.8 * exact
    assert found[-1] == pytest.approx(exact, abs=1e-3)
    assert sum(traces) == 1
    state = vmc._optimizer_state  # NetKet has no public name for it
    for leaf in jax.tree.leaves(optax.tree.get(state, "mu")):
        assert leaf.dtype == np.complex128
    for leaf in jax.tree.leaves(learning_rates(state, 0.03).bounded):
        assert leaf.dtype == np.float64


@pytest.mark.parametrize("reconfiguration", [False, True])
def test_without_a_bound_it_is_adam(reconfiguration):
    ours, adams = (
        energies(driver(tx, reconfiguration), 10)
        for tx in (adamod(0.03, b3=0), optax.adam(0.03))
    )
    np.testing.assert_allclose(ours, adams, rtol=1e-6)


def test_a_run_goes_on_from_its_serialized_driver():
    vmc = driver(adamod(0.03, b3=0.9), False)
    energies(vmc, 5)
    kept = flax.serialization.to_bytes(vmc)
    restored = flax.serialization.from_bytes(driver(adamod(0.03, b3=0.9), False), kept)
    chex.assert_trees_all_equal(restored._optimizer_state, vmc._optimizer_state)
    np.testing.assert_array_equal(energies(restored, 5), energies(vmc, 5))
