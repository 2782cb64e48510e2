"""What several test files share."""

import cv2
import pytest
import torch
from runs import SHAPES
from samples import MODELS, reference_network

from demo.shapes import make_dataset
from src import transform
from src.detector import Detector

# `make test` gives whole files to its workers, in this order: these first, so that the workers end together.
LONGEST = """
    test_stop_and_resume test_scripts test_export test_figures test_web test_distributed test_notebook test_train
    test_model
""".split()
torch.set_num_threads(1)  # sums in the order that scripts in processes of their own have: runs.ENV
cv2.setNumThreads(1)  # loading processes, forked from this one, would wait for ever for its threads


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


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
def blind():
    """The bundled detector of shapes, but it finds nothing, at once."""
    detector = Detector.load(SHAPES, "cpu")
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "scores": torch.zeros(0)}
    detector.detect_resized = lambda pixels, sizes, *_: [nothing for _ in sizes]
    return detector


@pytest.fixture(scope="module")
def models():
    """Both networks, with the weights of the reference values."""
    return {name: reference_network(name) for name in MODELS}
