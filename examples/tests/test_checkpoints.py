"""Do the example's checkpoints survive damage, and refuse what is another run's?"""

import shutil
import textwrap

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from examples import pod_training
from examples.common.pod_checkpoints import Checkpoints
from optax_adamod import adamod

TX = adamod(0.1, b3=0.9, mu_dtype="bfloat16", bound_dtype="bfloat16")
SHAPES = {"w": (8, 16), "b": (16,)}

pytestmark = pytest.mark.usefixtures("eight_devices")


def sharding(devices):
    """A function of a leaf, for a mesh of so many devices."""
    shape = (2, devices // 2) if devices > 1 else (1, 1)
    mesh = jax.make_mesh(
        shape,
        ("data", "fsdp"),
        axis_types=(AxisType.Auto,) * 2,
        devices=jax.devices()[:devices],
    )

    def of(leaf):
        return NamedSharding(mesh, P("data", "fsdp") if leaf.ndim == 2 else P())

    return of


def arrays(step):
    rng = np.random.default_rng(step)
    return {k: rng.normal(size=s).astype(np.float32) for k, s in SHAPES.items()}


def put(tree, of):
    return jax.tree.map(lambda x: jax.device_put(x, of(x)), tree)


def abstract(tree, of):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=of(x)), tree
    )


def run_of(step, of):
    """Parameters and state that differ from step to step."""
    params = put(arrays(step), of)
    _, state = jax.jit(TX.update)(params, TX.init(params))
    return params, state


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with the checkpoint of step 3 on 8 devices, and steps 3 and 6."""
    third, sixth = (run_of(step, sharding(8)) for step in (3, 6))
    folder = tmp_path_factory.mktemp("run")
    checkpoints = Checkpoints(folder)
    checkpoints.save(3, third)
    checkpoints.close()
    return folder, third, sixth


@pytest.fixture
def adam_run(tmp_path):
    """A folder with a checkpoint of optax.adam, its parameters and its state."""
    tx = optax.adam(0.1)
    params = {k: jnp.asarray(x) for k, x in arrays(0).items()}
    _, state = tx.update(params, tx.init(params))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"params": params, "opt_state": state})
    checkpoints.close()
    return tmp_path, params, state


def test_checkpoint_of_adam_is_refused_by_name(adam_run):
    folder, params, _ = adam_run
    checkpoints = Checkpoints(folder)
    like = {"params": params, "opt_state": adamod(0.1).init(params)}
    with pytest.raises(
        ValueError,
        match=r"1 lacks opt_state\.0\.bound \(2 arrays\)\. It is not of AdaMod",
    ):
        checkpoints.restore(like)
    checkpoints.close()
    assert (folder / "1").exists()  # it is good, and stays where it is


def test_adam_is_carried_over(adam_run):
    """By the lines of pod_training.py's docstring, as they stand there."""
    folder, params, saved = adam_run
    checkpoints = Checkpoints(folder)
    adam = {"params": params, "opt_state": optax.adam(0.1).init(params)}
    _, restored = checkpoints.restore(adam)
    checkpoints.close()
    after = pod_training.__doc__.split("the new optimizer:\n")[1]
    recipe = [line for line in after.splitlines() if line.startswith("    ")]
    names = {"adam_state": restored["opt_state"], "params": params}
    names |= {"tx": adamod(0.1), "optax": optax}
    exec(textwrap.dedent("\n".join(recipe)), names)
    state = names["state"]
    chex.assert_trees_all_equal(state[0][:3], saved[0][:3])
    chex.assert_trees_all_equal(state[0].bound, jax.tree.map(jnp.zeros_like, params))
    assert jax.tree.structure(state) == jax.tree.structure(adamod(0.1).init(params))
    _, state = adamod(0.1).update(params, state)
    assert state[0].count == 2


def test_other_shapes_are_refused_by_name(run):
    folder, third, _ = run
    checkpoints = Checkpoints(folder)
    like = abstract(third, sharding(8))
    like[0]["w"] = jax.ShapeDtypeStruct((8, 32), jnp.float32)
    with pytest.raises(
        ValueError, match=r"0\.w of shape \(8, 16\), but the model's is of \(8, 32\)"
    ):
        checkpoints.restore(like)
    checkpoints.close()


def cut(folder):
    """Halves every file of data in a checkpoint."""
    files = list(folder.rglob("d/*"))
    assert files
    for file in files:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


# Of the reads that it has under way when one fails, Orbax leaves callbacks behind.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_damaged_checkpoints_are_named_and_put_aside(run, tmp_path):
    _, third, sixth = run
    like = abstract(third, sharding(8))
    checkpoints = Checkpoints(tmp_path)
    for step, state in ((3, third), (6, sixth), (7, sixth)):
        checkpoints.save(step, state)
    checkpoints.wait()
    cut(tmp_path / "7")
    with pytest.warns(UserWarning, match=r"/7 cannot be read: .*renamed 7\.unreadable"):
        step, state = checkpoints.restore(like)
    assert step == 6
    chex.assert_trees_all_equal(*jax.device_get((state, sixth)))
    assert (tmp_path / "7.unreadable").exists()
    checkpoints.save(7, sixth)  # as training will, when it comes there again
    checkpoints.wait()
    assert checkpoints.restore(like)[0] == 7
    for step in (3, 6, 7):
        cut(tmp_path / str(step))
    with (
        pytest.warns(UserWarning, match="cannot be read"),
        pytest.raises(OSError, match=r"no checkpoint in .* can be read"),
    ):
        checkpoints.restore(like)
    with pytest.raises(OSError, match=r"no checkpoint in .* can be read"):
        checkpoints.restore(like)
    checkpoints.close()


def test_missing_metadata_counts_as_damage(run, tmp_path):
    folder, third, _ = run
    shutil.copytree(folder / "3", tmp_path / "3")
    shutil.copytree(folder / "3", tmp_path / "4")
    (tmp_path / "4" / "default" / "_METADATA").unlink()
    checkpoints = Checkpoints(tmp_path)
    with pytest.warns(UserWarning, match="/4 cannot be read"):
        step, _ = checkpoints.restore(abstract(third, sharding(8)))
    checkpoints.close()
    assert step == 3


def test_unfinished_checkpoints_are_named(run, tmp_path):
    folder, third, _ = run
    shutil.copytree(folder / "3", tmp_path / "3")
    shutil.copytree(folder / "3", tmp_path / f"4{ocp.utils.TMP_DIR_SUFFIX}")
    with pytest.warns(UserWarning, match="/4.* was not finished when a run ended"):
        checkpoints = Checkpoints(tmp_path)
    step, _ = checkpoints.restore(abstract(third, sharding(8)))
    assert step == 3
    checkpoints.save(4, third)  # waits until what was not finished is gone
    checkpoints.close()
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"3", "4"}


def test_the_newest_three_are_kept(run, tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for step in range(1, 6):
        checkpoints.save(step, run[1])
    checkpoints.close()
    assert {path.name for path in tmp_path.iterdir()} == {"3", "4", "5"}


def test_empty_folder_has_nothing_to_restore(tmp_path):
    checkpoints = Checkpoints(tmp_path / "new")
    assert checkpoints.restore({"w": jnp.ones(3)}) is None
    assert checkpoints.newest() is None
    checkpoints.close()
