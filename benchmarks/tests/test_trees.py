"""Do the shapes that are updated have their models' sizes, and groups of 128?"""

import jax
import pytest

from benchmarks import step_time
from benchmarks.common import llama, trees


@pytest.mark.parametrize(
    ("shapes", "parameters"),
    [
        (trees.resnet50(), 25_557_032),
        (trees.gpt2_small(), 124_439_808),
        (llama.shapes(llama.LLAMA_2_7B, "bfloat16"), 6_738_415_616),
        (trees.llama3("1B"), 1_235_814_400),
        (trees.llama3("8B"), 8_030_261_248),
        (trees.llama3("70B"), 70_553_706_496),
        (trees.llama3("405B"), 405_853_388_800),
        (trees.equal_leaves(1_000_000, 160), 1_000_000),
    ],
)
def test_shapes_have_their_models_sizes(shapes, parameters):
    assert trees.size(dict(enumerate(jax.tree.leaves(shapes)))) == parameters


@pytest.mark.parametrize(
    ("leaves", "parameters", "made"),
    [
        (1600, 25e6, 24_985_600), (160, 25e6, 24_944_640), (4, 2**30, 2**30),
        (16, 320, 320),
    ],
)  # fmt: skip
def test_matrices_have_groups_of_128(leaves, parameters, made):
    tree = trees.equal_matrices(int(parameters), leaves)
    assert len(tree) == leaves
    assert len({leaf.shape for leaf in tree.values()}) == 1
    assert trees.size(tree) == made
    assert step_time.has_groups(tree) == (made // leaves > 128)  # else too small
