"""demo/: the figures are drawn from any data set, and what they say is so."""

import importlib.util
import re

import numpy as np
import pytest
import torch
from PIL import Image
from runs import ROOT, SHAPES, frames_of

from demo import photos, slim, video
from demo.shapes import make_dataset
from src import transform
from src.boxes import DEFAULT_BOXES, Encoder, make_default_boxes, pairwise_iou
from src.checkpoint import load_checkpoint, save_checkpoint
from src.dataset import CocoDataset
from src.detector import Detector
from src.images import read_image
from src.model import build_model
from src.transform import sample_patch
from src.usage import UserError

FIRST = "network_ssd network_ssdlite default_boxes matching augmentation hard_negatives".split()
OF_A_DETECTOR = "hero before_and_after_nms precision_recall predictions".split()
GENERATED = {"shapes", "training", "predictions"}  # by make demo


@pytest.fixture(scope="module")
def figures():
    spec = importlib.util.spec_from_file_location("figures", ROOT / "demo" / "figures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def detector():
    return Detector.load(SHAPES, "cpu")


@pytest.fixture(scope="module")
def moving():
    """The frames of the clip."""
    return list(video.moving_shapes(np.random.default_rng(0)))


def titles(figure):
    return [ax.get_title() for ax in figure.axes if ax.get_visible()]


def texts(ax):
    return [text.get_text() for text in ax.texts]


@pytest.mark.parametrize("name, total", [("ssd", "8,732"), ("ssdlite", "3,000")])
def test_the_network_s_numbers_of_boxes(figures, name, total):
    said = texts(figures.network(name, 7, np.zeros((30, 40, 3), np.uint8)).axes[0])
    constants = DEFAULT_BOXES[name]
    for cells, per_cell in zip(constants.feature_maps, constants.per_cell, strict=True):
        assert f"{cells} x {cells}" in said and f"{cells**2 * per_cell:,}" in said
    assert f"= {total} boxes with scores" in said


@pytest.mark.parametrize("name, total", [("ssd", 8732), ("ssdlite", 3000)])
def test_default_boxes_of_the_six_maps_add_up(figures, shapes_folder, name, total):
    figure = figures.default_boxes(CocoDataset(shapes_folder, "train2017"), np.random.default_rng(0), name)
    counts = [int(re.search(r"([\d,]+) boxes$", title)[1].replace(",", "")) for title in titles(figure)]
    assert len(counts) == 6 and sum(counts) == total


def test_matching_shows_the_best_overlap_of_each_object_and_one_that_is_too_small(figures, shapes_folder):
    data, corners = CocoDataset(shapes_folder, "train2017"), Encoder(make_default_boxes("ssdlite")).corners
    figure = figures.matching(data, np.random.default_rng(0), "ssdlite")
    shown = [ax for ax in figure.axes if ax.get_visible()]
    assert len(shown) > 2
    for ax in shown:
        drawn = ax.patches[-1].get_bbox().extents  # the object's outline lies on top
        (g,) = np.flatnonzero(np.isclose(data.boxes, drawn, atol=1e-4).all(axis=1))
        iou = pairwise_iou(torch.from_numpy(data.boxes[[g]]), corners).amax()
        assert ax.get_title().startswith(f"{data.classes[data.labels[g]]}: ")
        assert ax.get_title().endswith(f"best IoU {iou:.2f}")
        assert 0.4 < float(texts(ax)[0]) < 0.5


def test_patches_are_those_that_the_results_were_cut_from(figures, shapes_folder, monkeypatch):
    drawn = []
    monkeypatch.setattr(transform, "sample_patch", lambda *given: drawn.append(sample_patch(*given)) or drawn[-1])
    figure = figures.augmentation(CocoDataset(shapes_folder, "train2017"), np.random.default_rng(0), "ssdlite")
    corners = {tuple(patch[:2].round(4)) for patch in drawn if patch is not None}  # of those that augment drew
    shown = [box.get_xy() for box in figure.axes[0].patches if box.get_linewidth() == 3]
    assert len(shown) == 4 and all(tuple(np.round(corner, 4)) in corners for corner in shown)
    assert [title.endswith("mirrored") for title in titles(figure)[1:]] == [False, True, False, True]


def test_three_negatives_for_each_matched_box(figures, shapes_folder):
    model = build_model("ssdlite", 7, pretrained_backbone=False)
    data = CocoDataset(shapes_folder, "train2017")
    figure = figures.hard_negatives(data, np.random.default_rng(0), "ssdlite", model)
    left, _, right, bar = figure.axes
    matched, hardest = (int(ax.get_title().split()[0]) for ax in (left, right))
    assert matched > 0 and hardest == 3 * matched
    assert [patch.get_width() for patch in bar.patches] == [matched, hardest, 3000 - matched - hardest]


def test_each_object_is_found_at_most_once(figures):
    boxes, labels = np.float32([[0, 0, 0.4, 0.4], [0.5, 0.5, 1, 1]]), np.array([1, 2])
    found = torch.tensor([[0, 0, 0.4, 0.4], [0, 0, 0.4, 0.41], [0.5, 0.5, 1, 1]])
    objects, right = figures.compare(boxes, labels, found, torch.tensor([1, 1, 1]))
    assert objects.tolist() == [True, False]  # the second has another class
    assert right.tolist() == [True, False, False]
    objects, right = figures.compare(boxes[:0], labels[:0], found, torch.tensor([1, 1, 1]))
    assert objects.tolist() == [] and not right.any()


def test_the_image_of_nms_is_one_without_a_mistake(figures, detector, tmp_path):
    make_dataset(tmp_path, train=1, val=30)
    data = CocoDataset(tmp_path, "val2017")
    index = figures.pick_right(data, np.random.default_rng(0), detector, 1, 4)
    boxes, labels, _ = figures.detect(detector, data.read(index))
    objects, right = figures.compare(*data.objects(index), boxes, labels)
    assert objects.all() and right.all()
    before, after = figures.before_and_after_nms(data, np.random.default_rng(0), detector).axes
    assert float(re.search(r"IoU (\S+) with", texts(before)[0])[1]) > 0.5
    assert after.get_title() == f"after: {len(texts(after))} boxes"


@pytest.fixture
def draw(figures, shapes_folder, tmp_path, monkeypatch):
    """Function that draws the figures of a data set as the command line does; returns {name: file}."""

    def run_it(*options):
        command = ["figures", "--data-path", shapes_folder, "--output", tmp_path / "all", *options]
        monkeypatch.setattr("sys.argv", list(map(str, command)))
        figures.main()
        return {file.stem: file for file in (tmp_path / "all").iterdir()}

    return run_it


def test_figures_of_own_data(draw):
    assert sorted(draw("--model", "ssd")) == sorted(FIRST)


def test_figures_of_a_checkpoint(draw):
    files = draw("--pretrained-model", SHAPES)
    assert set(files) == {*FIRST, *OF_A_DETECTOR}
    for file in files.values():
        assert file.stat().st_size < 500_000
        assert Image.open(file).width == 1660


def test_figures_of_a_detector_that_finds_nothing(figures, draw, blind, monkeypatch):
    monkeypatch.setattr(figures.Detector, "load", lambda *_: blind)
    for name in ("network", "default_boxes", "matching", "augmentation", "hard_negatives"):  # as above
        function = lambda *_: figures.plt.figure()  # noqa: E731
        function.__name__ = name
        monkeypatch.setattr(figures, name, function)
    assert set(draw("--pretrained-model", SHAPES)) == {*FIRST, *OF_A_DETECTOR}


def test_a_checkpoint_of_other_classes_is_refused(draw, tmp_path):
    save_checkpoint(tmp_path / "other.pth", load_checkpoint(SHAPES) | {"classes": ["background", *"abcdef"]})
    with pytest.raises(UserError, match="other classes"):
        draw("--pretrained-model", tmp_path / "other.pth")
    assert not (tmp_path / "all").exists()


def test_slim_checkpoint_detects_what_the_whole_one_does(tmp_path, monkeypatch):
    torch.manual_seed(0)
    network = build_model("ssdlite", 3, pretrained_backbone=False)
    names = {"classes": ["background", "a", "b"], "category_ids": [4, 9]}
    state = {"model": "ssdlite", "model_state_dict": network.state_dict(), "optimizer": {}} | names
    save_checkpoint(tmp_path / "whole.pth", state)
    monkeypatch.setattr("sys.argv", ["slim", str(tmp_path / "whole.pth"), str(tmp_path / "slim.pth")])
    slim.main()
    half = load_checkpoint(tmp_path / "slim.pth")
    assert {key: half[key] for key in names} == names and "optimizer" not in half
    for name, values in network.state_dict().items():
        torch.testing.assert_close(half["model_state_dict"][name].to(values.dtype), values, rtol=1e-3, atol=1e-6)
    whole, small = ((tmp_path / f"{name}.pth").stat().st_size for name in ("whole", "slim"))
    assert small < 0.6 * whole


def test_the_clip_moves(tmp_path, monkeypatch, moving):
    monkeypatch.setattr(video, "moving_shapes", lambda rng: moving)
    monkeypatch.setattr("sys.argv", ["video", "--output", str(tmp_path / "moving.avi")])
    video.main()
    frames = frames_of(tmp_path / "moving.avi")
    assert len(frames) == 60 and frames[0].shape == (480, 640, 3)
    steps = [abs(frames[t] - frames[t - 1]).mean() for t in range(60)]  # the first is that from the last: it is a loop
    assert min(steps) > 0.5 and max(steps) < 2 * min(steps)


def test_the_gif_shows_each_shape_once_and_no_false_box(detector, moving, tmp_path):
    found = []

    def watched(*given, **settings):
        found.append(detector(*given, **settings))
        return found[-1]

    watched.classes = detector.classes
    video.write_gif(tmp_path / "moving.gif", moving, watched)
    assert len(found) == 60 and all(sorted(one["labels"].tolist()) == [1, 2, 3, 4, 5, 6] for (one,) in found)
    for path in (tmp_path / "moving.gif", ROOT / "demo" / "video.gif"):
        shown = Image.open(path)
        assert shown.n_frames == 60 and shown.size == (640, 480)
        assert shown.info["duration"] == pytest.approx(1000 / 12, abs=5)


@pytest.mark.parametrize("name", ["airplane", "snowboarder"])
def test_photographs_show_what_the_bundled_detector_finds(name):
    photo = read_image(ROOT / "demo" / "photos" / f"{name}.jpg")
    drawn = photos.draw(Detector.load(ROOT / "demo" / "ssdlite_voc.pth", "cpu"), photo, photo.shape[0])
    shown = read_image(ROOT / "demo" / f"{1 + photos.NAMES.index(name)}.jpg")
    changed = np.abs(drawn.astype(int) - shown).max(axis=2) > 100  # more than JPEG does
    assert changed.mean() < 0.002, "run make photos"


def test_photographs_have_their_licenses():
    folder = ROOT / "demo" / "photos"
    rows = re.findall(r"(?m)^\| \[(\S+)\].*\[(?:CC BY 2.0|CC0|public domain)\]", (folder / "CREDITS.md").read_text())
    files = sorted(f.name for f in folder.iterdir() if f.suffix != ".md")
    assert sorted(rows) == files and {f"{name}.jpg" for name in photos.NAMES} <= set(files)


def test_what_is_shown_is_small_enough_to_be_cloned():
    images = [f for f in (ROOT / "demo").rglob("*") if f.suffix in (".jpg", ".png")]
    images = [f for f in images if f.relative_to(ROOT / "demo").parts[0] not in GENERATED]
    assert len(images) >= 13 and all(f.stat().st_size < 400_000 for f in images)
    assert {f.stem for f in images if f.parent.name == "figures"} == {*FIRST, *OF_A_DETECTOR}
    assert (ROOT / "demo" / "video.gif").stat().st_size < 3_000_000
    assert SHAPES.stat().st_size < 10_000_000
