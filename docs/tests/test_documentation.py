"""Is what README and the pages say true of the code, and does what they show run?"""

import re
import tomllib
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

import optax_adamod

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def commands():
    return [line for block in blocks("sh") for line in block.splitlines()]


def test_the_two_commands_stand_in_readme():
    assert (
        "pip install -e '.[examples]' && python -m examples.warmup_free_transformer"
        in commands()
    )
    assert "pip install -e '.[test]' && pytest" in commands()


def test_readme_swap_of_adam_for_adamod_trains():
    """Both sides of the swap, with the same loop around them."""
    (swap,) = blocks("diff")
    before, after = (re.findall(rf"^\{sign}(.*)$", swap, re.MULTILINE) for sign in "-+")
    assert len(before) + len(after) == 3
    target = jnp.array([0.1, -0.2])

    def train(lines):
        namespace = {"optax": optax}
        exec(compile("\n".join(lines), "README.md", "exec"), namespace)
        tx = namespace["tx"]

        def body(carry, _):
            params, state = carry
            updates, state = tx.update(params - target, state, params)
            return (optax.apply_updates(params, updates), state), None

        params = jnp.zeros(2)
        (params, state), _ = jax.lax.scan(body, (params, tx.init(params)), length=800)
        return params, state

    for lines in (before, after):
        params, state = train(lines)
        chex.assert_trees_all_close(params, target, atol=1e-2)
    assert optax.tree.get(state, "bound") is not None  # of AdaMod, the second


SCHEDULE = optax.cosine_decay_schedule(0.1, 10)
PAGES = sorted((ROOT / "docs").glob("*.md"))
TEXTS = [*PAGES, ROOT / "CONTRIBUTING.md"]
LINKED = [ROOT / "README.md", *TEXTS, *sorted(ROOT.glob("*/README.md"))]


HEADS = {"query": jnp.ones((8, 2, 64)), "up": jnp.ones((8, 256))}


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_code_of_pages_runs(path, tmp_path, capsys):
    """Block after block, with what a page takes for granted."""
    code = re.findall(r"^```python\n(.*?)^```", path.read_text(), re.DOTALL | re.M)
    code = [block for block in code if "torch." not in block]  # is not installed
    if jax.default_backend() == "cpu" and jax.__version_info__ < (0, 10):
        # Such a JAX cannot move arrays to host memory inside jit on CPU.
        code = [block for block in code if "pinned_host" not in block]
    params = {"w": jnp.ones(3)}
    adam = optax.adam(0.1)
    mesh = jax.make_mesh((1,), ("data",), (jax.sharding.AxisType.Auto,))
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    granted = {
        "from_adam.md": {
            "optax": optax, "params": params, "tx": optax_adamod.adamod(0.1),
            "adam_state": adam.update(params, adam.init(params), params)[1],
        },
        "memory.md": dict.fromkeys(("params", "gradients"), HEADS),
        "pods.md": {
            "jax": jax, "optax": optax, "folder": tmp_path, "mesh": mesh,
            "params": jax.device_put(params, replicated),
            "tx": optax_adamod.adamod(0.1),
            "loss": lambda params, batch: jnp.sum(params["w"] * batch),
        },
    }  # fmt: skip
    namespace = dict(granted.get(path.name, {}))
    for block in code:
        exec(compile(block, path.name, "exec"), namespace)
    if path.name == "memory.md":
        assert namespace["share"] == 2 / 3
        in_8_bits = optax.tree.get(namespace["state"], "nu")["query"]
        assert isinstance(in_8_bits, optax_adamod.Float8Array)
        chex.assert_trees_all_equal_shapes(namespace["updates"], HEADS)
    if path.name == "pods.md":
        state, restored = namespace["state"], namespace["restored"]
        chex.assert_trees_all_equal(restored, {"params": params, "opt_state": state})
        updated, state = namespace["step"](params, state, jnp.ones(3))
        assert int(optax.tree.get(state, "count")) == 1
        assert bool((updated["w"] < 1).all())
    if path.name == "watching.md":
        (output,) = re.findall(r"^```text\n(.*?)\n```", path.read_text(), re.M | re.S)
        assert capsys.readouterr().out.strip() == output


def test_share_of_gpt2_in_8_bits():
    """In Flax's shapes: heads apart, and logits apart from the embedding."""

    def shapes(**leaves):
        return {k: jax.ShapeDtypeStruct(x, jnp.float32) for k, x in leaves.items()}

    width, heads = 768, (12, 64)
    norm, head = {"scale": (width,), "bias": (width,)}, (width, *heads)
    block = [
        *[shapes(kernel=head, bias=heads)] * 3,
        shapes(kernel=(*heads, width), bias=(width,)),
        shapes(kernel=(width, 4 * width), bias=(4 * width,)),
        shapes(kernel=(4 * width, width), bias=(width,)),
        *[shapes(**norm)] * 2,
    ]
    others = shapes(tokens=(50257, width), positions=(1024, width), **norm)
    params = [[block] * 12, others, shapes(logits=(width, 50257))]
    page = (ROOT / "docs" / "memory.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.M)
    (first, *_), (code,) = blocks, [x for x in blocks if "share = " in x]
    namespace = {"params": params}
    for each in (first, code):
        exec(compile(each, "memory.md", "exec"), namespace)
    state = jax.tree.leaves(jax.eval_shape(namespace["tx"].init, params))
    size = sum(x.size for x in jax.tree.leaves(params))
    bytes_per_parameter = sum(x.size * x.dtype.itemsize for x in state) / size
    assert f"{namespace['share']:.0%}".replace("%", " %") in page
    assert f"{bytes_per_parameter:.2f} bytes per parameter" in page


FACTORIES = {
    "constant": (optax.adam(0.1), optax_adamod.adamod(0.1)),
    "schedule": (optax.adam(SCHEDULE), optax_adamod.adamod(SCHEDULE)),
    "chain": (
        optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(SCHEDULE)),
        optax.chain(optax.clip_by_global_norm(1.0), optax_adamod.adamodw(SCHEDULE)),
    ),
    "bfloat16": (
        optax.adam(0.1),
        optax_adamod.adamod(0.1, mu_dtype="bfloat16", bound_dtype="bfloat16"),
    ),
}


@pytest.mark.parametrize("name", FACTORIES)
def test_adams_averages_go_on(name):
    (code,) = re.findall(
        r"^```python\n(.*?)^```",
        (ROOT / "docs" / "from_adam.md").read_text(), re.DOTALL | re.M,
    )  # fmt: skip
    adam, tx = FACTORIES[name]
    params = {"w": jnp.array([0.5, 1.0, 2.0])}
    adam_state = adam.init(params)
    for _ in range(3):
        _, adam_state = adam.update(params, adam_state, params)
    namespace = {"optax": optax, "adam_state": adam_state, "tx": tx, "params": params}
    exec(code, namespace)
    state = namespace["state"]
    fresh = tx.init(params)
    chex.assert_trees_all_equal_dtypes(state, fresh)
    chex.assert_trees_all_equal_structs(state, fresh)
    counts = [int(x) for _, x in optax.tree.get_all_with_path(state, "count")]
    assert counts == [3] * len(counts)
    assert len(counts) == (1 if name in ("constant", "bfloat16") else 2)
    for average in ("mu", "nu"):
        chex.assert_trees_all_close(
            optax.tree.get(state, average),
            optax.tree.cast_like(
                optax.tree.get(adam_state, average), optax.tree.get(fresh, average)
            ),
        )
    assert not optax.tree.get(state, "bound")["w"].any()
    tx.update(params, state, params)
    docstring = (ROOT / "examples" / "pod_training.py").read_text().split('"""')[1]
    indented = "".join(f"    {line}\n" for line in code.splitlines() if line)
    for line in indented.splitlines():
        assert line in docstring


def test_every_public_name_is_on_the_pages():
    public = {name for name in vars(optax_adamod) if not name.startswith("_")}
    reference = (ROOT / "docs" / "api.md").read_text()
    documented = re.findall(r"^\.\. auto(?:function|class):: (\w+)$", reference, re.M)
    assert sorted(documented) == sorted(public)


def test_every_page_says_something():
    assert min(len(path.read_text().splitlines()) for path in PAGES) > 20


def test_every_page_is_in_the_contents():
    (index,) = (path for path in PAGES if path.name == "index.md")
    trees = re.findall(r"```{toctree}\n(?::.*\n)*\n([^`]*)```", index.read_text())
    listed = {name for tree in trees for name in tree.split()}
    assert listed == {path.stem for path in PAGES} - {"index"}


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_files_of_pages_exist(path):
    text = path.read_text()
    rooms = "benchmarks|clients|examples|experiments|tests"
    for script in re.findall(rf"((?:{rooms})/[\w/]+\.\w+)", text):
        assert (ROOT / script).exists(), script


def test_every_client_has_a_row():
    text = (ROOT / "docs" / "other_libraries.md").read_text()
    named = re.findall(r"`(clients/test_\w+\.py)` \|$", text, re.M)
    clients = (ROOT / "clients").glob("test_*.py")
    assert sorted(named) == sorted(str(path.relative_to(ROOT)) for path in clients)


@pytest.mark.parametrize("path", LINKED, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)[^)]*\)", text):
        assert (path.parent / target).exists(), target


def test_public_names_are_in_readme():
    public = [name for name in vars(optax_adamod) if not name.startswith("_")]
    states = {
        "ScaleByAdamodState", "RoundUpdatesStochasticallyState", "Float8Array",
        "LearningRates", "Log10Histogram", "HeldByBound",
    }  # fmt: skip
    functions = {
        "adamod", "adamodw", "scale_by_adamod",
        "learning_rates", "log10_histogram", "held_by_bound", "from_adam",
        "from_adamod", "from_torch", "round_updates_stochastically",
    }  # fmt: skip
    assert set(public) == states | functions
    for name in functions:
        assert re.search(rf"\b{name}\b", README)


def test_version_is_in_changelog():
    assert optax_adamod.__version__ == PROJECT["version"]
    assert f"## {PROJECT['version']}" in (ROOT / "CHANGELOG.md").read_text()
