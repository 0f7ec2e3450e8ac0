"""Are the experiments' images, models and optimizers what they should be?"""

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from examples.common.resnet import ResNet
from experiments import densenet, robustness
from experiments.data import images as data
from experiments.models.densenet import DenseNet
from experiments.tasks import images as tasks
from experiments.tasks.images import Options, accuracy, optimizers


def parameters(create):
    state = nnx.state(nnx.eval_shape(create), nnx.Param)
    return sum(x.size for x in jax.tree.leaves(state))


def test_full_size_models():
    dense = parameters(lambda: DenseNet((6, 12, 24, 16), 32, 3, 100, rngs=nnx.Rngs(0)))
    assert round(dense / 1e6, 1) == 7.0
    residual = parameters(lambda: ResNet((3, 4, 6, 3), 64, 3, 10, rngs=nnx.Rngs(0)))
    assert round(residual / 1e6, 1) == 21.3


@pytest.mark.usefixtures("quick_compilation")
def test_densenet_keeps_what_a_layer_saw():
    model = DenseNet((2, 1), 4, 1, 10, rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 8, 8, 1)), jnp.float32)

    @nnx.jit
    def layers(model):
        first = model.stem(x)
        second = model.layers[0](first)
        return first, second, model.layers[2](model.layers[1](second)), model(x)

    first, second, third, logits = layers(model)
    assert first.shape == (3, 8, 8, 8)
    assert second.shape == (3, 8, 8, 12)
    np.testing.assert_array_equal(second[..., 4:], first)
    assert third.shape == (3, 4, 4, 8)
    assert logits.shape == (3, 10)


def test_digits():
    digits = data.digits()
    assert digits.train_images.shape == (1437, 8, 8, 1)
    assert digits.test_images.shape == (360, 8, 8, 1)
    assert digits.train_images.dtype == np.float32
    np.testing.assert_allclose(digits.train_images.mean(), 0, atol=1e-6)
    np.testing.assert_allclose(digits.train_images.std(), 1, rtol=1e-6)
    # As many of each class on both sides, and no image on both.
    counts = np.bincount(digits.train_labels) / np.bincount(digits.test_labels)
    np.testing.assert_allclose(counts, 4, atol=0.2)
    train, test = (
        {x.tobytes() for x in part}
        for part in (digits.train_images, digits.test_images)
    )
    assert not train & test


def small(augment=False):
    images = np.arange(20 * 9, dtype=np.float32).reshape(20, 3, 3, 1) + 1
    return data.Images(images, np.arange(20), images[:4], np.arange(4), 20, augment)


def test_batches_go_through_all_images_in_every_epoch():
    batches = small().batches(seed=1, size=4)
    epochs = [[batches[5 * epoch + i] for i in range(5)] for epoch in range(2)]
    orders = [np.concatenate([b["label"] for b in epoch]) for epoch in epochs]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(20))
    assert not np.array_equal(*orders)
    for batch in epochs[0]:
        np.testing.assert_array_equal(
            batch["image"], small().train_images[batch["label"]]
        )
    again = small().batches(seed=1, size=4)
    np.testing.assert_array_equal(again[7]["label"], epochs[1][2]["label"])
    other = small().batches(seed=2, size=4)
    assert not np.array_equal(other[0]["label"], epochs[0][0]["label"])


def test_training_images_are_moved_and_flipped():
    batches = small(augment=True).batches(seed=0, size=20)
    moved, flipped = set(), set()
    for batch in (batches[i] for i in range(10)):
        for image, label in zip(batch["image"], batch["label"], strict=True):
            original = small().train_images[label]
            shown = np.argwhere(image[..., 0] > 0)
            for row, column in shown:
                where = np.argwhere(original == image[row, column])
                (source,) = where
                moved.add(int(row - source[0]))
            if len({tuple(x) for x in shown[:, :1]}) and len(shown) > 1:
                line = image[shown[0, 0], :, 0]
                steps = np.diff(line[line > 0])
                flipped |= set(np.sign(steps).astype(int).tolist())
    # A move by more than the image's three pixels leaves nothing to see.
    assert moved == {-2, -1, 0, 1, 2}
    assert flipped == {-1, 1}


def cifar_files(folder, classes, columns):
    rng = np.random.default_rng(0)
    made_of = {}
    for split, count in (("train", 8), ("test", 4)):
        pixels = rng.integers(256, size=(count, 32, 32, 3), dtype=np.uint8)
        features = datasets.Features(
            {"img": datasets.Image()}
            | {name: datasets.ClassLabel(classes) for name in columns}
        )
        rows = {"img": [Image.fromarray(x) for x in pixels]}
        rows |= {name: [i % classes for i in range(count)] for name in columns}
        made = datasets.Dataset.from_dict(rows, features=features)
        made.to_parquet(folder / f"{split}.parquet")
        made_of[split] = pixels
    return made_of


@pytest.mark.parametrize(
    ("classes", "columns"), [(10, ["label"]), (100, ["fine_label", "coarse_label"])]
)
def test_cifar_from_files(tmp_path, monkeypatch, classes, columns):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "data").mkdir()
    pixels = cifar_files(tmp_path / "data", classes, columns)
    images = data.cifar(classes, str(tmp_path / "data"))
    assert images.train_images.shape == (8, 32, 32, 3)
    assert (images.classes, images.augment) == (classes, True)
    np.testing.assert_allclose(images.train_images.mean((0, 1, 2)), 0, atol=1e-6)
    np.testing.assert_allclose(images.train_images.std((0, 1, 2)), 1, rtol=1e-5)
    np.testing.assert_array_equal(images.test_labels, range(4))
    # The test images are scaled by the training images' mean and deviation.
    mean, deviation = (
        np.asarray(f(pixels["train"].reshape(-1, 3), axis=0)) for f in (np.mean, np.std)
    )
    expected = (pixels["test"] - mean) / deviation
    np.testing.assert_allclose(images.test_images, expected, atol=1e-5)


def test_cifar_without_its_column(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "data").mkdir()
    cifar_files(tmp_path / "data", 10, ["label"])
    with pytest.raises(ValueError, match=r"lacks \['fine_label'\]"):
        data.cifar(100, str(tmp_path / "data"))


def test_cifar_that_is_not_there(tmp_path):
    with pytest.raises(OSError, match=r"nothing.*Parquet files.*--data"):
        data.cifar(10, str(tmp_path / "nothing"))


def test_optimizers_are_the_authors():
    params, gradient = jnp.full(3, 2.0), jnp.asarray([0.5, -1.0, 3.0])
    steps = 100
    moved = {}
    for name, tx in optimizers(0.1, steps, 0.9).items():
        state, moves = tx.init(params), []
        for _ in range(80):
            updates, state = tx.update(gradient, state, params)
            moves.append(np.asarray(updates))
        moved[name] = np.stack(moves)
    decay = 5e-4 * 2.0
    np.testing.assert_allclose(moved["SGD"][0], -0.1 * (gradient + decay), rtol=1e-5)
    np.testing.assert_allclose(
        moved["SGD"][1], -0.1 * 1.9 * (gradient + decay), rtol=1e-5
    )
    # Constant gradients: Adam's step is the learning rate, with decay beside it.
    expected = -0.1 * (np.sign(gradient) + decay)
    np.testing.assert_allclose(moved["AdamW"][20], expected, rtol=1e-4)
    opened = -0.1 * ((1 - 0.9 ** np.arange(1, 51))[:, None] * np.sign(gradient) + decay)
    np.testing.assert_allclose(moved["AdaMod"][:50], opened, rtol=1e-4)
    np.testing.assert_allclose(moved["AdamW"][50], expected / 10, rtol=1e-4)
    np.testing.assert_allclose(moved["AdamW"][75], expected / 100, rtol=1e-4)


def test_accuracy():
    class Answers(nnx.Module):
        """Knows the first three of four images, when it is not training."""

        def __init__(self):
            self.norm = nnx.BatchNorm(1, rngs=nnx.Rngs(0))

        def __call__(self, images):
            answer = jnp.where(images[:, 0, 0, 0] > 27, 0, (images[:, 0, 0, 0] - 1) / 9)
            assert self.norm.use_running_average
            return jax.nn.one_hot(answer.astype(int), 20)

    assert accuracy(Answers(), small()) == 0.75


def test_accuracy_goes_through_all_test_images(monkeypatch):
    monkeypatch.setattr(tasks, "EVALUATED", 3)
    test_accuracy()


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("experiment", [robustness, densenet])
def test_experiments_run(experiment, tmp_path, capsys, monkeypatch):
    name = experiment.__name__.split(".")[-1]
    monkeypatch.setattr("sys.argv", [f"{name}.py", "--seeds", "1"])
    monkeypatch.setattr(robustness, "LEARNING_RATES", (0.01,))
    # Of the same kinds, but of fewer layers to compile.
    monkeypatch.setitem(robustness.MODELS, "laptop", ((1,), 8))
    monkeypatch.setitem(densenet.MODELS, "laptop", ((1, 1), 8))
    monkeypatch.setitem(tasks.SIZES, "laptop", tasks.Size(1, 64, 0.99))
    monkeypatch.setattr(tasks, "ROWS", 2)
    experiment.main(Options(seeds=1, output=tmp_path))
    printed = capsys.readouterr().out
    assert f"`python -m experiments.{name} --seeds 1`" in printed
    assert "Test accuracy after 22 steps" in printed
    assert "| AdaMod, b3 0.99 |" in printed
    assert "22, 0.2 horizons of 100 |" in printed
    folder = tmp_path / f"{name}_laptop"
    assert len(list((folder / "runs").glob("*_seed_0"))) == 3
    for ending in ("md", "csv"):
        assert (folder / f"{name}.{ending}").stat().st_size > 100


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match="--seeds must be at least 1, got 0"):
        Options(seeds=0)
    with pytest.raises(ValueError, match="--data needs --size full"):
        Options(data="x")
