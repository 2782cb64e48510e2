"""The augmentation: SSD section 2.2, "Data augmentation", and section 3.6, which adds the zoom-out.

Each image is sampled by one of seven options: the whole image; a patch whose minimum jaccard overlap (IoU) with the
objects is 0.1, 0.3, 0.5, 0.7 or 0.9; any patch. Its size is 0.1 to 1 of the image's, its aspect ratio 1/2 to 2.
Objects whose center is inside are kept. Half of the images are flipped.
"""

import math
import random

import numpy as np
import pytest
from samples import ONE_OBJECT, THREE_OBJECTS, kolmogorov_smirnov, scene

from src import transform


def test_there_are_seven_options_and_five_have_a_minimum_iou():
    # The only object covers the whole image: the IoU of a patch with it is the area of the patch.
    class OneOption:
        def __init__(self, option):
            self.option, self.uniform = option, np.random.default_rng(option).uniform

        def integers(self, count):
            assert count == 7
            return self.option

    whole = np.float32([(0, 0, 1, 1)])
    assert transform.sample_patch(whole, OneOption(0)) is None
    smallest = []
    for option in range(1, 7):
        rng = OneOption(option)
        patches = np.array([transform.sample_patch(whole, rng) for _ in range(200)])
        smallest.append((patches[:, 2:] - patches[:, :2]).prod(axis=1).min())
    smallest.sort()
    assert smallest[1] < 0.2
    np.testing.assert_array_less([0.3, 0.5, 0.7, 0.9], smallest[2:])
    np.testing.assert_allclose(smallest[2:], [0.3, 0.5, 0.7, 0.9], atol=0.02)


def plain_crop(objects, source):
    """The section in plain Python: (patch or None for the whole image, number of objects kept).

    What the paper leaves open is the published recipe's: sides of 0.3 to 1, which gives areas of about 0.1 to 1, and a
    new option after a rejected patch.
    """
    while True:
        option = source.choice(["whole", 0.1, 0.3, 0.5, 0.7, 0.9, "any"])
        if option == "whole":
            return None, len(objects)
        w, h = 0.3 + 0.7 * source.random(), 0.3 + 0.7 * source.random()
        if w > 2 * h or h > 2 * w:
            continue
        x, y = (1 - w) * source.random(), (1 - h) * source.random()
        kept, worst = 0, 1
        for x1, y1, x2, y2 in objects:
            kept += x < (x1 + x2) / 2 < x + w and y < (y1 + y2) / 2 < y + h
            shared = max(0, min(x2, x + w) - max(x1, x)) * max(0, min(y2, y + h) - max(y1, y))
            worst = min(worst, shared / ((x2 - x1) * (y2 - y1) + w * h - shared))
        if kept and (option == "any" or worst > option):
            return (x, y, x + w, y + h), kept


def statistics(patches):
    """What is compared of [(patch or None, objects kept), ...]: a name -> a list of numbers."""
    real = [patch for patch, _ in patches if patch is not None]
    return {
        "whole": [float(patch is None) for patch, _ in patches],
        "kept": [kept for _, kept in patches],
        "left": [x1 for x1, _, _, _ in real],
        "top": [y1 for _, y1, _, _ in real],
        "right": [x2 for _, _, x2, _ in real],
        "bottom": [y2 for _, _, _, y2 in real],
        "area": [(x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in real],
        "aspect": [(x2 - x1) / (y2 - y1) for x1, y1, x2, y2 in real],
    }


@pytest.mark.parametrize("objects", [ONE_OBJECT, THREE_OBJECTS], ids=["one object", "three objects"])
def test_patches_are_distributed_as_in_the_section_in_plain_python(objects):
    rng, source, boxes = np.random.default_rng(1), random.Random(2), np.float32(objects)
    centers = (boxes[:, :2] + boxes[:, 2:]) / 2
    ours = []
    plain = [plain_crop(objects, source) for _ in range(20_000)]
    for _ in range(20_000):
        patch = transform.sample_patch(boxes, rng)
        if patch is None:
            ours.append((None, len(objects)))
        else:
            inside = (centers > patch[:2]).all(1) & (centers < patch[2:]).all(1)
            ours.append((patch.tolist(), int(inside.sum())))
    ours, plain = statistics(ours), statistics(plain)
    for name, values in ours.items():
        distance, limit = kolmogorov_smirnov(values, plain[name])
        assert distance < limit, (name, distance, limit)


def test_an_object_is_kept_if_its_center_is_inside_the_patch_and_clipped_to_it(monkeypatch):
    # The patch is 20..60 x 20..80 of an image of 100 x 100; the objects are worked out by hand.
    monkeypatch.setattr(transform, "sample_patch", lambda *_: np.array([0.2, 0.2, 0.6, 0.8]))
    boxes = np.float32([(0.3, 0.3, 0.5, 0.5), (0.5, 0.1, 0.65, 0.5), (0.55, 0.5, 0.75, 0.7), (0, 0, 0.1, 0.1)])
    image = scene(100, 100)
    cut, kept, labels = transform.crop(image, boxes, np.array([5, 6, 7, 8]), None)
    np.testing.assert_array_equal(cut, image[20:80, 20:60])
    np.testing.assert_allclose(kept, [(0.25, 1 / 6, 0.75, 0.5), (0.75, 0, 1, 0.5)], atol=1e-6)
    assert labels.tolist() == [5, 6]


def test_half_of_the_images_are_flipped(no_jitter, monkeypatch):
    monkeypatch.setattr(transform, "resize", lambda image, size: image)  # for speed
    image, none = np.zeros((4, 4, 3), np.uint8), np.zeros((0, 4), np.float32)
    image[:, :2] = 255  # bright on the left
    flips = 0
    for seed in range(20_000):
        out, _, _ = transform.augment(image, none, np.zeros(0, int), np.random.default_rng(seed), 300)
        assert {int(out[1, 0, 0]), int(out[1, 3, 0])} == {0, 255}
        flips += out[1, 0, 0] == 0
    assert abs(flips - 10_000) < 4 * math.sqrt(20_000) / 2  # outside once in 16,000 times


def test_half_of_the_images_are_zoomed_out_on_a_canvas_of_up_to_16_times_their_area():
    # Section 3.6: "a canvas of 16x of the original image size filled with mean values".
    image = np.full((50, 60, 3), 7, np.uint8)
    rng = np.random.default_rng(0)
    ratios = []
    places = []
    for _ in range(2000):
        canvas, boxes = transform.expand(image, np.float32([(0, 0, 1, 1)]), rng)
        height, width, _ = canvas.shape
        left, top, right, bottom = np.round(boxes[0] * np.tile([width, height], 2)).astype(int)
        assert (right - left, bottom - top) == (60, 50)
        assert (canvas[top:bottom, left:right] == 7).all()
        if canvas.shape != image.shape:
            rest = canvas.sum() - 7 * image.size
            assert rest == (124 + 116 + 104) * (width * height - 60 * 50)  # ImageNet's mean
            ratios.append(width / 60)
            if width > 90:
                places.append(left / (width - 60))
    assert abs(len(ratios) - 1000) < 100
    assert min(ratios) < 1.1 and max(ratios) > 3.9 and max(ratios) <= 4
    assert abs(np.mean(ratios) - 2.5) < 0.11  # four standard deviations of a uniform 1..4
    assert min(places) < 0.02 and max(places) > 0.98 and abs(np.mean(places) - 0.5) < 0.05
