"""What several tests of the experiments are given."""

import pytest
from tqdm import tqdm


@pytest.fixture
def progress():
    with tqdm(disable=True) as bar:
        yield bar
