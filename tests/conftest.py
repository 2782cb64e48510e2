"""What several test files share."""

import pytest
from samples import MODELS, reference_network

from demo.shapes import make_dataset
from src import transform


@pytest.fixture(scope="session")
def shapes_folder(tmp_path_factory):
    """Folder of 12 training and 6 validation images; both sets have an image without objects and a crowd."""
    folder = tmp_path_factory.mktemp("shapes")
    make_dataset(folder, train=12, val=6)
    return folder


@pytest.fixture
def no_jitter(monkeypatch):
    """The augmentation without its colors."""
    monkeypatch.setattr(transform, "jitter_colors", lambda image, rng: image)


@pytest.fixture(scope="module")
def models():
    """Both networks, with the weights of the reference values."""
    return {name: reference_network(name) for name in MODELS}
