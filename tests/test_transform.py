"""src.transform against Pillow and torchvision; crops, and boxes that stay with their pixels.

What the paper states is in paper/test_data_augmentation.py.
"""

import cv2
import numpy as np
import pytest
import torch
import torchvision.transforms.functional as F
from PIL import Image
from samples import ONE_OBJECT, kolmogorov_smirnov, scene
from torchvision import transforms

from src import transform

# Crops


def test_an_image_without_objects_stays_whole():
    image, rng = scene(), np.random.default_rng(0)
    for _ in range(50):
        cut, boxes, labels = transform.crop(image, np.zeros((0, 4), np.float32), np.zeros(0, int), rng)
        assert cut.shape == image.shape and boxes.shape == (0, 4) and labels.shape == (0,)


def test_a_crop_of_a_tiny_image_has_pixels_and_an_object():
    rng = np.random.default_rng(0)
    for height, width in ((1, 1), (1, 7), (3, 2)):
        for _ in range(200):
            image, boxes, labels = transform.crop(
                np.zeros((height, width, 3), np.uint8), np.float32(ONE_OBJECT), np.ones(1, int), rng
            )
            assert min(image.shape) > 0 and len(boxes) == len(labels) == 1
            assert (boxes[:, 2:] > boxes[:, :2]).all() and boxes.min() >= 0 and boxes.max() <= 1


# Boxes that stay with their pixels


@pytest.mark.parametrize("zoom_out", [False, True])
def test_boxes_stay_with_their_pixels(no_jitter, zoom_out):
    colors = np.uint8([(255, 0, 0), (0, 255, 0), (0, 0, 255)])
    pixels = np.array([(20, 30, 80, 90), (110, 15, 180, 75), (90, 100, 150, 140)])
    image = np.zeros((150, 200, 3), np.uint8)
    for (x1, y1, x2, y2), color in zip(pixels, colors, strict=True):
        image[y1:y2, x1:x2] = color
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
    # Objects cover 0.12 of the image. A crop leaves a quarter or more, zoom-out down to 1/16.
    assert (min(areas) < 0.02) == zoom_out


@pytest.mark.parametrize("mirror", [True, False])
def test_left_stays_left_without_mirroring(mirror):
    image = np.tile(np.linspace(0, 255, 60).astype(np.uint8)[:, None], (50, 1, 3))
    boxes, labels = np.array([[0.1, 0.2, 0.6, 0.9]], np.float32), np.array([1])
    brighter_left = []
    for seed in range(40):
        sample, _, _ = transform.augment(image, boxes, labels, np.random.default_rng(seed), 30, mirror=mirror)
        brighter_left.append(sample[:, :15].mean() > sample[:, 15:].mean())
    assert 10 < sum(brighter_left) < 30 if mirror else not any(brighter_left)


def test_a_canvas_larger_than_needed_shrinks_and_its_boxes_stay_with_their_pixels():
    image, pixels = np.zeros((400, 600, 3), np.uint8), np.array([120, 100, 420, 340])
    image[100:340, 120:420] = 255
    boxes, shrunk = (pixels / (600, 400, 600, 400)).astype(np.float32)[None], 0
    for seed in range(12):
        whole, expected = transform.expand(image, boxes, np.random.default_rng(seed))
        canvas, moved = transform.expand(image, boxes, np.random.default_rng(seed), 700)
        assert canvas.shape[:2] == (min(700, whole.shape[0]), min(700, whole.shape[1]))
        np.testing.assert_array_equal(moved, expected)
        if canvas.shape == whole.shape:
            np.testing.assert_array_equal(canvas, whole)
            continue
        shrunk += 1
        white = canvas.min(axis=2) > 200
        rows, columns = white.any(axis=1).nonzero()[0], white.any(axis=0).nonzero()[0]
        found = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
        np.testing.assert_allclose(found, moved[0] * np.tile(canvas.shape[1::-1], 2), atol=1.5)
    assert 2 < shrunk < 10


def test_zooming_out_of_a_photograph_makes_no_more_pixels_than_a_crop_can_use(no_jitter, monkeypatch):
    sizes = []
    crop = transform.crop
    monkeypatch.setattr(transform, "crop", lambda image, *rest: sizes.append(image.shape) or crop(image, *rest))
    for seed in range(2):
        image, rng = np.zeros((2000, 3000, 3), np.uint8), np.random.default_rng(seed)
        transform.augment(image, np.float32(ONE_OBJECT), np.ones(1, int), rng, 300, zoom_out=True)
    assert max(max(size) for size in sizes) <= 3000


def test_boxes_of_an_augmented_image_are_valid():
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


# Colors


class Recorder:
    """A generator that keeps what it drew."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)
        self.factors = []
        self.order = None

    def uniform(self, *arguments):
        drawn = self.rng.uniform(*arguments)
        self.factors += np.atleast_1d(drawn).tolist()
        return drawn

    def permutation(self, count):
        self.order = self.rng.permutation(count)
        return self.order


def test_colors_are_those_of_torchvision():
    steps = F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue
    image = scene()
    differences = []
    orders = set()
    for seed in range(100):
        rng = Recorder(seed)
        ours = transform.jitter_colors(image, rng)
        expected = torch.from_numpy(image).permute(2, 0, 1)
        for step in rng.order:
            expected = steps[step](expected, rng.factors[step])
        expected = expected.permute(1, 2, 0).numpy()
        differences.append(np.abs(ours.astype(int) - expected).mean())
        orders.add(tuple(rng.order))
    assert len(orders) > 20  # of 24, in 100 draws
    assert np.mean(differences) < 2 and max(differences) < 6, max(differences)


def test_augmentation_ends_with_other_colors():
    gray, none = np.full((8, 8, 3), 128, np.uint8), np.zeros((0, 4), np.float32)
    levels = set()
    for seed in range(50):
        out, _, _ = transform.augment(gray, none, np.zeros(0, int), np.random.default_rng(seed), 300)
        levels.add(int(out[0, 0, 0]))
    assert len(levels) > 20  # brightness alone moves 128 by up to 16


def test_color_factors_are_distributed_as_torchvisions():
    torch.manual_seed(0)
    ranges = [(0.875, 1.125), (0.5, 1.5), (0.5, 1.5), (-0.05, 0.05)]
    pixel = np.zeros((1, 1, 3), np.uint8)
    ours = []
    theirs = []
    for seed in range(20_000):
        rng = Recorder(seed)
        transform.jitter_colors(pixel, rng)
        ours.append([*rng.factors, 4 * rng.order[0] + rng.order[1]])
        order, *factors = transforms.ColorJitter.get_params(*ranges)
        theirs.append([*factors, 4 * int(order[0]) + int(order[1])])
    names = "brightness", "contrast", "saturation", "hue", "order"
    for name, our, their in zip(names, np.transpose(ours), np.transpose(theirs), strict=True):
        distance, limit = kolmogorov_smirnov(our, their)
        assert distance < limit, (name, distance, limit)


# Resize and normalize


@pytest.mark.parametrize("height, width", [(600, 900), (480, 640), (120, 70), (300, 300), (1, 1)])
def test_resize_is_pillows_bilinear(height, width):
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    ours = transform.resize(image, 300)
    pillow = np.asarray(Image.fromarray(image).resize((300, 300), Image.Resampling.BILINEAR))
    assert ours.shape == (300, 300, 3) and ours.dtype == np.uint8
    assert ours.flags.c_contiguous
    assert np.abs(ours.astype(int) - pillow).mean() < 1


def test_resize_takes_a_view():
    image = scene(400, 500)  # a crop is a view of its image
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
