"""src.transform against Pillow, torchvision and a plain rewrite of the paper's crop."""

import bisect
import colorsys
import math
import random

import cv2
import numpy as np
import pytest
import torch
import torchvision.transforms.functional as F
from PIL import Image
from samples import scene
from torchvision import transforms

from src import transform

LARGE = [(0.15, 0.1, 0.85, 0.8)]
SEVERAL = [(0.1, 0.2, 0.45, 0.6), (0.5, 0.5, 0.9, 0.95), (0.3, 0.4, 0.7, 0.75)]


# The crop's distribution


def plain_crop(objects, source):
    """SSD section 2.2 as DESIGN.md states it, one draw a patch: (patch or None, objects kept)."""
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
    """What is compared of [(patch or None, objects kept), ...], a list of numbers each."""
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


def kolmogorov_smirnov(a, b):
    """Largest distance of two samples' distributions, and what it exceeds once in 10^6 times."""
    a, b = sorted(a), sorted(b)
    share = lambda values, x: bisect.bisect_right(values, x) / len(values)  # noqa: E731
    distance = max(abs(share(a, x) - share(b, x)) for x in [*a, *b])
    return distance, math.sqrt(-math.log(1e-6 / 2) / 2 * (len(a) + len(b)) / (len(a) * len(b)))


@pytest.mark.parametrize("objects", [LARGE, SEVERAL], ids=["one object", "three objects"])
def test_patches_are_distributed_as_in_the_paper(objects):
    rng, source, boxes = np.random.default_rng(1), random.Random(2), np.float32(objects)
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    ours, plain = [], [plain_crop(objects, source) for _ in range(20_000)]
    for _ in range(20_000):
        patch = transform.sample_patch(boxes, rng)
        if patch is None:
            ours.append((None, len(objects)))
        else:
            inside = (centres > patch[:2]).all(1) & (centres < patch[2:]).all(1)
            ours.append((patch.tolist(), int(inside.sum())))
    ours, plain = statistics(ours), statistics(plain)
    for name, values in ours.items():
        distance, limit = kolmogorov_smirnov(values, plain[name])
        assert distance < limit, (name, distance, limit)


def test_the_kinds_of_patch_are_those_of_the_paper():
    # SSD section 2.2: IoU at least 0.1, 0.3, 0.5, 0.7 or 0.9; or any patch. With one object, the
    # whole picture, a patch's IoU is its area.
    class OneKind:
        def __init__(self, kind):
            self.kind, self.uniform = kind, np.random.default_rng(kind).uniform

        def integers(self, count):
            assert count == 7
            return self.kind

    whole = np.float32([(0, 0, 1, 1)])
    assert transform.sample_patch(whole, OneKind(0)) is None
    smallest = []
    for kind in range(1, 7):
        rng = OneKind(kind)
        patches = np.array([transform.sample_patch(whole, rng) for _ in range(200)])
        smallest.append((patches[:, 2:] - patches[:, :2]).prod(axis=1).min())
    smallest.sort()
    assert smallest[1] < 0.2
    np.testing.assert_array_less([0.3, 0.5, 0.7, 0.9], smallest[2:])
    np.testing.assert_allclose(smallest[2:], [0.3, 0.5, 0.7, 0.9], atol=0.02)


def test_crop_keeps_the_objects_whose_centre_is_inside_and_clips_them(monkeypatch):
    # Patch 20..60 x 20..80 of a picture of 100 x 100: objects worked out by hand.
    monkeypatch.setattr(transform, "sample_patch", lambda *_: np.array([0.2, 0.2, 0.6, 0.8]))
    boxes = np.float32([(0.3, 0.3, 0.5, 0.5), (0.5, 0.1, 0.65, 0.5), (0.55, 0.5, 0.75, 0.7), (0, 0, 0.1, 0.1)])
    image = scene(100, 100)
    cut, kept, labels = transform.crop(image, boxes, np.array([5, 6, 7, 8]), None)
    np.testing.assert_array_equal(cut, image[20:80, 20:60])
    np.testing.assert_allclose(kept, [(0.25, 1 / 6, 0.75, 0.5), (0.75, 0, 1, 0.5)], atol=1e-6)
    assert labels.tolist() == [5, 6]


def test_picture_without_objects_stays_whole():
    image, rng = scene(), np.random.default_rng(0)
    for _ in range(50):
        cut, boxes, labels = transform.crop(image, np.zeros((0, 4), np.float32), np.zeros(0, int), rng)
        assert cut.shape == image.shape and boxes.shape == (0, 4) and labels.shape == (0,)


def test_crop_of_a_tiny_picture_has_pixels_and_an_object():
    rng = np.random.default_rng(0)
    for height, width in ((1, 1), (1, 7), (3, 2)):
        for _ in range(200):
            image, boxes, labels = transform.crop(
                np.zeros((height, width, 3), np.uint8), np.float32(LARGE), np.ones(1, int), rng
            )
            assert min(image.shape) > 0 and len(boxes) == len(labels) == 1
            assert (boxes[:, 2:] > boxes[:, :2]).all() and boxes.min() >= 0 and boxes.max() <= 1


# Flip, zoom-out, and boxes that stay with their pixels


@pytest.fixture
def no_jitter(monkeypatch):
    monkeypatch.setattr(transform, "jitter_colours", lambda image, rng: image)


def test_half_of_the_pictures_are_mirrored(no_jitter, monkeypatch):
    monkeypatch.setattr(transform, "resize", lambda image, size: image)  # for speed
    image, none = np.zeros((4, 4, 3), np.uint8), np.zeros((0, 4), np.float32)
    image[:, :2] = 255  # bright on the left
    flips = 0
    for seed in range(20_000):
        out, _, _ = transform.augment(image, none, np.zeros(0, int), np.random.default_rng(seed), 300)
        assert {int(out[1, 0, 0]), int(out[1, 3, 0])} == {0, 255}
        flips += out[1, 0, 0] == 0
    assert abs(flips - 10_000) < 4 * math.sqrt(20_000) / 2  # outside once in 16,000 times


def test_zoom_out_is_half_the_time_and_up_to_four_times():
    # SSD section 3.6: "a canvas of 16x of the original image size filled with mean values".
    image = np.full((50, 60, 3), 7, np.uint8)
    rng, ratios, places = np.random.default_rng(0), [], []
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


@pytest.mark.parametrize("zoom_out", [False, True])
def test_boxes_stay_with_their_pixels(no_jitter, zoom_out):
    colours = np.uint8([(255, 0, 0), (0, 255, 0), (0, 0, 255)])
    pixels = np.array([(20, 30, 80, 90), (110, 15, 180, 75), (90, 100, 150, 140)])
    image = np.zeros((150, 200, 3), np.uint8)
    for (x1, y1, x2, y2), colour in zip(pixels, colours, strict=True):
        image[y1:y2, x1:x2] = colour
    boxes = (pixels / (200, 150, 200, 150)).astype(np.float32)
    seen, areas = set(), []
    for seed in range(1000):
        rng = np.random.default_rng(seed)
        out, kept, labels = transform.augment(image, boxes, np.array([0, 1, 2]), rng, 300, zoom_out)
        assert out.shape == (300, 300, 3) and len(kept) == len(labels) > 0
        planes = [plane.astype(np.int16) for plane in cv2.split(out)]
        for box, label in zip(kept, labels, strict=True):
            own, *others = (planes[(label + k) % 3] for k in range(3))
            mask = own - np.maximum(*others) > 110
            columns, rows = mask.any(axis=0).nonzero()[0], mask.any(axis=1).nonzero()[0]
            found = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
            np.testing.assert_allclose(found, box * 300, atol=2, err_msg=f"seed {seed}")
            areas.append((box[2] - box[0]) * (box[3] - box[1]))
        seen.add(tuple(labels))
    assert len(seen) >= 4  # crops that keep some objects and drop others were among them
    # Objects cover 0.12 of the picture. A crop leaves a quarter or more, zoom-out down to 1/16.
    assert (min(areas) < 0.02) == zoom_out


def test_boxes_of_an_augmented_picture_are_valid():
    rng = np.random.default_rng(0)
    for seed in range(300):
        corners = rng.uniform(0, 1, (5, 2, 2))
        boxes = np.concatenate([corners.min(1), corners.max(1)], axis=1).astype(np.float32)
        labels = np.arange(1, 6)
        image, kept, left = transform.augment(
            scene(30, 40), boxes, labels, np.random.default_rng(seed), 300, zoom_out=seed % 2 == 0
        )
        assert image.shape == (300, 300, 3) and image.dtype == np.uint8
        assert kept.dtype == np.float32 and left.dtype == labels.dtype
        assert kept.min() >= 0 and kept.max() <= 1 and (kept[:, 2:] > kept[:, :2]).all()


def test_same_generator_same_sample_another_generator_another():
    def sample(seed):
        rng = np.random.default_rng(seed)
        return transform.augment(scene(), np.float32(SEVERAL), np.arange(3), rng, 300, zoom_out=True)

    first, again, other = sample((1, 2, 3)), sample((1, 2, 3)), sample((1, 2, 4))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0], other[0])


# Colours


class Recorder:
    """A generator that keeps what it drew."""

    def __init__(self, seed):
        self.rng, self.factors, self.order = np.random.default_rng(seed), [], None

    def uniform(self, *arguments):
        drawn = self.rng.uniform(*arguments)
        self.factors += np.atleast_1d(drawn).tolist()
        return drawn

    def permutation(self, count):
        self.order = self.rng.permutation(count)
        return self.order


def test_colours_are_those_of_torchvision():
    steps = F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue
    image, differences, orders = scene(), [], set()
    for seed in range(100):
        rng = Recorder(seed)
        ours = transform.jitter_colours(image, rng)
        expected = torch.from_numpy(image).permute(2, 0, 1)
        for step in rng.order:
            expected = steps[step](expected, rng.factors[step])
        expected = expected.permute(1, 2, 0).numpy()
        differences.append(np.abs(ours.astype(int) - expected).mean())
        orders.add(tuple(rng.order))
    assert len(orders) > 20  # of 24, in 100 draws
    assert np.mean(differences) < 2 and max(differences) < 6, max(differences)


def test_augmentation_ends_with_other_colours():
    grey, none = np.full((8, 8, 3), 128, np.uint8), np.zeros((0, 4), np.float32)
    levels = set()
    for seed in range(50):
        out, _, _ = transform.augment(grey, none, np.zeros(0, int), np.random.default_rng(seed), 300)
        levels.add(int(out[0, 0, 0]))
    assert len(levels) > 20  # brightness alone moves 128 by up to 16


def test_colour_factors_are_distributed_as_torchvisions():
    torch.manual_seed(0)
    ranges = [(0.875, 1.125), (0.5, 1.5), (0.5, 1.5), (-0.05, 0.05)]
    pixel, ours, theirs = np.zeros((1, 1, 3), np.uint8), [], []
    for seed in range(20_000):
        rng = Recorder(seed)
        transform.jitter_colours(pixel, rng)
        ours.append([*rng.factors, 4 * rng.order[0] + rng.order[1]])
        order, *factors = transforms.ColorJitter.get_params(*ranges)
        theirs.append([*factors, 4 * int(order[0]) + int(order[1])])
    names = "brightness", "contrast", "saturation", "hue", "order"
    for name, our, their in zip(names, np.transpose(ours), np.transpose(theirs), strict=True):
        distance, limit = kolmogorov_smirnov(our, their)
        assert distance < limit, (name, distance, limit)


def test_colour_factors_cover_the_published_ranges():
    # Found in the pixels, with no knowledge of how they are drawn. A grey picture is changed by
    # brightness and contrast only, chroma (max - min) by these two and saturation, hue by hue.
    grey, colour = np.full((2, 2, 3), 96, np.uint8), np.full((1, 1, 3), (170, 70, 70), np.uint8)
    grey[1] = 160
    found = []
    for seed in range(600):
        low, high = transform.jitter_colours(grey, np.random.default_rng(seed))[:, 0, 0].astype(float)
        out = transform.jitter_colours(colour, np.random.default_rng(seed))[0, 0] / 255
        turn, _, _ = colorsys.rgb_to_hsv(*out)
        brightness = (low + high) / 256
        both = (high - low) / 64  # brightness and contrast
        chroma = 255 * (out.max() - out.min()) / 100
        found.append((brightness, both / brightness, chroma / both, (turn + 0.5) % 1 - 0.5))
    expected = {"brightness": (0.875, 1.125, 0.01), "contrast": (0.5, 1.5, 0.05)}
    expected |= {"saturation": (0.5, 1.5, 0.08), "hue": (-0.05, 0.05, 0.008)}
    for values, (name, (low, high, slack)) in zip(np.transpose(found), expected.items(), strict=True):
        assert low - slack < values.min() < low + slack, name
        assert high - slack < values.max() < high + slack, name
        middle, spread = (low + high) / 2, (high - low) / math.sqrt(12)
        assert abs(values.mean() - middle) < 4 * spread / math.sqrt(600), name
        assert values.std() == pytest.approx(spread, rel=0.1), name  # uniform


# Resize and normalise


@pytest.mark.parametrize("height, width", [(600, 900), (480, 640), (120, 70), (300, 300), (1, 1)])
def test_resize_is_pillows_bilinear(height, width):
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    ours = transform.resize(image, 300)
    pillow = np.asarray(Image.fromarray(image).resize((300, 300), Image.Resampling.BILINEAR))
    assert ours.shape == (300, 300, 3) and ours.dtype == np.uint8
    assert ours.flags.c_contiguous
    assert np.abs(ours.astype(int) - pillow).mean() < 1


def test_resize_takes_a_view():
    image = scene(400, 500)  # a crop is a view of its picture
    np.testing.assert_array_equal(
        transform.resize(image[50:250, 100:420], 300), transform.resize(image[50:250, 100:420].copy(), 300)
    )


def test_normalize_is_torchvisions():
    images = np.stack([transform.resize(scene(), 300), transform.resize(scene(90, 60), 300)])
    reference = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])]
    )
    expected = torch.stack([reference(Image.fromarray(image)) for image in images])
    ours = transform.normalize(torch.from_numpy(images))
    assert ours.dtype == torch.float32 and ours.shape == (2, 3, 300, 300)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


def test_normalize_leaves_its_input_alone():
    images = torch.randint(0, 256, (1, 300, 300, 3), dtype=torch.uint8)
    before = images.clone()
    first, second = transform.normalize(images), transform.normalize(images)
    assert torch.equal(images, before) and torch.equal(first, second)
