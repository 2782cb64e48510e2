"""What happens to pixels before the network: augment, resize, normalize.

Images are (H, W, 3) uint8 RGB; boxes (G, 4) float32 xyxy relative to the image, in [0, 1].
"""

from functools import lru_cache

import cv2
import numpy as np
import torch
import torch.nn.functional as F

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
GRAY = (0.299, 0.587, 0.114)  # luma of ITU-R BT.601, as in torchvision's ColorJitter


def augment(image, boxes, labels, rng, size, zoom_out=False, mirror=True):
    """The training augmentation (SSD section 2.2 "data augmentation"); mirror: left to right, half the time.

    image (H, W, 3), boxes (G, 4), labels (G,), rng a numpy Generator
        -> image (size, size, 3), boxes (K, 4), labels (K,), K <= G
    """
    if zoom_out:
        image, boxes = expand(image, boxes, rng, 10 * size)  # of which a crop takes 3 * size, at least
    image, boxes, labels = crop(image, boxes, labels, rng)
    image = resize(image, size)  # before the flip: the same image either way, with fewer pixels to move
    if rng.random() < 0.5 and mirror:  # drawn in any case: the rest stays as it is
        image, boxes = flip(image, boxes)
    return jitter_colors(image, rng), boxes, labels


def expand(image, boxes, rng, longest=10**6):
    """Zoom out (SSD section 3.6): half the time, put the image on a canvas up to 4 times as wide and high.

    A side of the canvas that would have more than `longest` pixels shrinks to that, and the image with it.
    """
    if rng.random() < 0.5:
        return image, boxes
    height, width = image.shape[:2]
    ratio = rng.uniform(1, 4)
    canvas_h, canvas_w = int(height * ratio), int(width * ratio)
    top, left = rng.integers(canvas_h - height + 1), rng.integers(canvas_w - width + 1)
    shown_h, shown_w = min(canvas_h, longest), min(canvas_w, longest)
    canvas = np.empty((shown_h, shown_w, 3), np.uint8)
    canvas[:] = np.round(255 * np.array(IMAGENET_MEAN))
    first_row, last_row = (round(y * shown_h / canvas_h) for y in (top, top + height))
    first_column, last_column = (round(x * shown_w / canvas_w) for x in (left, left + width))
    if (shown_h, shown_w) != (canvas_h, canvas_w):
        image = resize(image, (last_row - first_row, last_column - first_column))
    canvas[first_row:last_row, first_column:last_column] = image
    scale = np.array([width, height, width, height], np.float32)
    shift = np.array([left, top, left, top], np.float32)
    size = np.array([canvas_w, canvas_h, canvas_w, canvas_h], np.float32)
    return canvas, (boxes * scale + shift) / size


def crop(image, boxes, labels, rng):
    """Sample a patch (SSD section 2.2); its objects are those whose center lies inside, clipped.

    Paper (its code): up to 50 draws of a scale and a ratio, until one object has the minimum IoU.
    Here, as in NVIDIA's and uvipen's recipes: draw width and height once; every object must reach the minimum
    IoU; if the patch is rejected (ratio of the sides, IoU, no object's center inside), start again with
    a new option.
    """
    if len(boxes) == 0:
        return image, boxes, labels
    patch = sample_patch(boxes, rng)
    if patch is None:
        return image, boxes, labels
    height, width = image.shape[:2]
    # Whole pixels, at least one; the boxes below use the patch that is really cut out.
    left, top = int(patch[0] * width), int(patch[1] * height)
    right = max(left + 1, round(float(patch[2]) * width))
    bottom = max(top + 1, round(float(patch[3]) * height))
    patch = np.array([left / width, top / height, right / width, bottom / height], np.float32)
    inside = centers_inside(boxes, patch)
    if not inside.any():  # a center within half a pixel of the patch's border
        return image, boxes, labels
    origin, side = np.tile(patch[:2], 2), np.tile(patch[2:] - patch[:2], 2)
    boxes = ((boxes[inside] - origin) / side).clip(0, 1)
    return image[top:bottom, left:right], boxes, labels[inside]


def sample_patch(boxes, rng):
    """Draw the patch of `crop`: (4,) float64 xyxy in [0, 1], or None for the whole image."""
    while True:  # ends: option 0 needs nothing of the patch
        option = rng.integers(7)
        if option == 0:
            return None
        width, height = rng.uniform(0.3, 1, 2)
        left, top = rng.uniform(0, 1 - width), rng.uniform(0, 1 - height)
        patch = np.array([left, top, left + width, top + height])
        if not 0.5 <= width / height <= 2 or not centers_inside(boxes, patch).any():
            continue
        min_iou = (0.1, 0.3, 0.5, 0.7, 0.9, -1)[option - 1]
        overlap = np.minimum(boxes[:, 2:], patch[2:]) - np.maximum(boxes[:, :2], patch[:2])
        intersection = overlap.clip(0).prod(axis=1)
        areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
        if (intersection / (areas + width * height - intersection) > min_iou).all():
            return patch


def centers_inside(boxes, patch):
    """Which of boxes (G, 4) have their center inside the patch (4,): (G,) bool."""
    centers = (boxes[:, :2] + boxes[:, 2:]) / 2
    return ((centers > patch[:2]) & (centers < patch[2:])).all(axis=1)


def flip(image, boxes):
    """Mirror image and boxes left to right."""
    return cv2.flip(image, 1), np.stack([1 - boxes[:, 2], boxes[:, 1], 1 - boxes[:, 0], boxes[:, 3]], axis=1)


def resize(image, size):
    """(H, W, 3) uint8 -> (size, size, 3) uint8, bilinear with antialiasing; the aspect ratio is not kept.

    size: one number, or height and width.
    """
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
    # A patch is a view into its image: copied into one piece it is resized twice as fast.
    pixels = pixels.contiguous(memory_format=torch.channels_last)
    pixels = F.interpolate(pixels, size, mode="bilinear", antialias=True)
    return np.ascontiguousarray(pixels[0].permute(1, 2, 0).numpy())


def jitter_colors(image, rng):
    """Brightness, contrast, saturation and hue in random order: torchvision's ColorJitter.

    Paper (its code): each half the time, brightness added, hue by up to 0.1. Here: uvipen's
    ranges.
    """
    brightness = rng.uniform(1 - 0.125, 1 + 0.125)
    contrast, saturation = rng.uniform(1 - 0.5, 1 + 0.5, 2)
    hue = rng.uniform(-0.05, 0.05)
    for step in rng.permutation(4):
        if step == 0:
            image = cv2.convertScaleAbs(image, alpha=brightness)
        elif step == 1:
            mean = round(float(np.dot(cv2.mean(image)[:3], GRAY)))
            levels = contrast * np.arange(256) + (1 - contrast) * mean
            image = cv2.LUT(image, levels.round().clip(0, 255).astype(np.uint8))
        elif step == 2:
            image = cv2.transform(image, saturation * np.eye(3) + (1 - saturation) * np.array(GRAY))
        else:
            image = shift_hue(image, hue)
    return image


def shift_hue(image, hue):
    """Turn the hue of every pixel by `hue` (in turns)."""
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)  # hue in 0..255
    hsv[..., 0] += np.uint8(round(hue * 256) % 256)  # wraps around, as hues do
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


def normalize(images):
    """(B, H, W, 3) levels of 255 -> (B, 3, H, W) float32 in channels_last, on the same device."""
    mean, std = imagenet_statistics(images.device)
    return images.permute(0, 3, 1, 2).to(torch.float32, copy=True).sub_(mean).div_(std)


@lru_cache
def imagenet_statistics(device):
    """Mean and standard deviation, (1, 3, 1, 1) each in levels of 255; kept on the device."""
    statistics = torch.tensor([IMAGENET_MEAN, IMAGENET_STD], device=device) * 255
    return statistics.view(2, 1, 3, 1, 1).unbind()
