"""demo/: the figures are drawn from any data set, and what they say is so."""

import importlib.util
import re

import numpy as np
import pytest
import torch
from PIL import Image
from runs import ROOT, frames_of, run

from src.boxes import Encoder, make_default_boxes, pairwise_iou
from src.checkpoint import load_checkpoint, save_checkpoint
from src.dataset import CocoDataset
from src.model import build_model

FIRST = "default_boxes matching augmentation hard_negatives".split()
CHECKPOINT = ROOT / "demo" / "ssdlite_shapes.pth"
GENERATED = {"shapes", "training", "predictions"}  # by make demo


@pytest.fixture(scope="module")
def figures():
    spec = importlib.util.spec_from_file_location("figures", ROOT / "demo" / "figures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def titles(figure):
    return [ax.get_title() for ax in figure.axes if ax.get_visible()]


@pytest.mark.parametrize("name, total", [("ssd", 8732), ("ssdlite", 3000)])
def test_default_boxes_of_the_six_maps_add_up(figures, shapes_folder, name, total):
    figure = figures.default_boxes(CocoDataset(shapes_folder, "train2017"), np.random.default_rng(0), name)
    counts = [int(re.search(r"(\d+) boxes$", title)[1]) for title in titles(figure)]
    assert len(counts) == 6 and sum(counts) == total


def test_matching_shows_the_best_overlap_of_each_object(figures, shapes_folder):
    data, rng = CocoDataset(shapes_folder, "train2017"), np.random.default_rng(0)
    index = figures.pick(data, np.random.default_rng(0), 1, fewest=6, most=6)[0]
    boxes, labels = data.objects(index)
    corners = Encoder(make_default_boxes("ssdlite")).corners
    best = pairwise_iou(torch.from_numpy(boxes), corners).amax(dim=1)
    said = titles(figures.matching(data, rng, "ssdlite"))
    assert len(said) == len(boxes) > 2
    for title, label, iou in zip(said, labels, best, strict=True):
        assert title.startswith(f"{data.classes[label]}: ")
        assert title.endswith(f"best IoU {iou:.2f}")


def test_three_negatives_for_each_matched_box(figures, shapes_folder):
    network = build_model("ssdlite", 7, pretrained_backbone=False)
    data = CocoDataset(shapes_folder, "train2017")
    figure = figures.hard_negatives(data, np.random.default_rng(0), "ssdlite", network, "new")
    pairs = [tuple(map(int, re.findall(r"\d+", title))) for title in titles(figure)]
    assert len(pairs) == 4 and all(3 * matched == hard for matched, hard in pairs)
    assert sum(matched for matched, _ in pairs) > 0


def test_figures_of_own_data_and_of_a_checkpoint(shapes_folder, tmp_path):
    script = ["-m", "demo.figures", "--data-path", shapes_folder, "--output"]
    run(*script, tmp_path / "own", "--model", "ssd")
    assert sorted(f.stem for f in (tmp_path / "own").iterdir()) == sorted(FIRST)
    run(*script, tmp_path / "all", "--pretrained-model", CHECKPOINT)
    found = {f.stem: f for f in (tmp_path / "all").iterdir()}
    assert set(found) == {*FIRST, "before_and_after_nms", "precision_recall", "predictions"}
    for file in found.values():
        assert file.stat().st_size < 300_000
        assert Image.open(file).width == 830


def test_a_checkpoint_of_other_classes_is_refused(shapes_folder, tmp_path):
    state = load_checkpoint(CHECKPOINT)
    save_checkpoint(tmp_path / "other.pth", state | {"classes": ["background", *"abcdef"]})
    script = ["-m", "demo.figures", "--data-path", shapes_folder, "--output", tmp_path / "all"]
    done = run(*script, "--pretrained-model", tmp_path / "other.pth", status=2)
    assert "other classes" in done.stderr and not (tmp_path / "all").exists()


def test_slim_checkpoint_detects_what_the_whole_one_does(tmp_path):
    torch.manual_seed(0)
    network = build_model("ssdlite", 3, pretrained_backbone=False)
    names = {"classes": ["background", "a", "b"], "category_ids": [4, 9]}
    state = {"model": "ssdlite", "model_state_dict": network.state_dict(), "optimizer": {}} | names
    save_checkpoint(tmp_path / "whole.pth", state)
    run("-m", "demo.slim", tmp_path / "whole.pth", tmp_path / "slim.pth")
    slim = load_checkpoint(tmp_path / "slim.pth")
    assert {key: slim[key] for key in names} == names and "optimizer" not in slim
    for name, values in network.state_dict().items():
        torch.testing.assert_close(slim["model_state_dict"][name].to(values.dtype), values, rtol=1e-3, atol=1e-6)
    whole, small = ((tmp_path / f"{name}.pth").stat().st_size for name in ("whole", "slim"))
    assert small < 0.6 * whole


def test_clip_and_gif(tmp_path):
    clip, gif = tmp_path / "moving.avi", tmp_path / "moving.gif"
    run("-m", "demo.video", "--output", clip)
    frames = frames_of(clip)
    assert len(frames) == 30 and frames[0].shape == (240, 320, 3)
    assert abs(frames[0] - frames[-1]).mean() > 5  # something moves
    run("-m", "demo.video", "--input", clip, "--output", gif)
    shown = Image.open(gif)
    assert shown.n_frames == 30 and shown.info["duration"] == pytest.approx(1000 / 6, abs=10)


def test_what_is_shown_is_small_enough_to_be_cloned():
    pictures = [f for f in (ROOT / "demo").rglob("*") if f.suffix in (".jpg", ".png", ".gif")]
    pictures = [f for f in pictures if f.relative_to(ROOT / "demo").parts[0] not in GENERATED]
    assert len(pictures) >= 11 and all(f.stat().st_size < 300_000 for f in pictures)
    assert CHECKPOINT.stat().st_size < 10_000_000
