"""Inputs of the reference cases: each is a pure function of its seed, so only outputs are stored.

Needs NumPy alone. `weights` gives the same "random" network to any implementation that uses the
same parameter names, so that two implementations can be compared without a trained checkpoint.
"""

import zlib

import numpy as np


def ground_truth(seed, num_classes=81):
    """Boxes (G, 4) float32 xyxy in [0, 1] and labels (G,) int64 in 1..num_classes-1, G in 1..24.

    Sizes are log-uniform from 1 % to 95 % of the image. When seed % 4 == 0 the second box lies
    almost on the first, so that both want the same default box.
    """
    rng = np.random.default_rng([1, seed])
    count = int(rng.integers(1, 25))
    center = rng.uniform(0.02, 0.98, (count, 2))
    size = np.exp(rng.uniform(np.log(0.01), np.log(0.95), (count, 2)))
    boxes = np.concatenate([center - size / 2, center + size / 2], axis=1).clip(0, 1)
    boxes = boxes[((boxes[:, 2:] - boxes[:, :2]) > 0.004).all(axis=1)]
    if seed % 4 == 0 and len(boxes) > 1:
        boxes[1] = boxes[0] + 0.001
    return boxes.astype(np.float32), rng.integers(1, num_classes, len(boxes))


def predictions(seed, num_defaults, num_classes=81, num_objects=5):
    """Raw outputs for one image: loc (D, 4), cls_logits (D, C) float32, class 0 background."""
    rng = np.random.default_rng([2, seed])
    loc = rng.normal(0, 0.5, (num_defaults, 4)).astype(np.float32)
    logits = rng.normal(0, 0.3, (num_defaults, num_classes)).astype(np.float32)
    logits[:, 0] += 6
    for _ in range(num_objects):
        label = int(rng.integers(1, num_classes))
        start = int(rng.integers(0, num_defaults - 30))
        logits[start : start + 30, label] += 5 + rng.normal(0, 1, 30).astype(np.float32)
    return loc, logits


def weights(shapes):
    """{parameter name: float32 array} for {name: shape}; what one gets depends on its name alone.

    Scaled like a trained network (He fan-in, batch-norm statistics near the identity), so
    activations stay in range and detections come out.
    """
    arrays = {}
    for name, shape in shapes.items():
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        if name.endswith("num_batches_tracked"):
            arrays[name] = np.array(1000, dtype=np.int64)
        elif name.endswith("running_var"):
            arrays[name] = rng.uniform(0.6, 1.4, shape).astype(np.float32)
        elif name.endswith("running_mean"):
            arrays[name] = rng.normal(0, 0.1, shape).astype(np.float32)
        elif len(shape) == 4:
            gain = {"loc": 1.0, "conf": 36.0}.get(name.split(".")[0], 2.0)
            arrays[name] = rng.normal(0, (gain / np.prod(shape[1:])) ** 0.5, shape).astype(np.float32)
        elif name.endswith("weight"):
            arrays[name] = rng.uniform(0.4, 0.8, shape).astype(np.float32)
        else:
            arrays[name] = rng.normal(0, 0.1, shape).astype(np.float32)
    return arrays


def lite_weights(shapes):
    """The same for the published SSDLite-MobileNetV2: `weights`' signal would die out in its depthwise layers."""
    arrays = weights(shapes)
    for name, shape in shapes.items():
        rng = np.random.default_rng(zlib.crc32(name.encode()) + 1)
        if len(shape) == 4:
            heads = {"classification_headers": 0.4, "regression_headers": 0.04} if shape[1] > 1 else {}
            gain = heads.get(name.split(".")[0], 2.5)
            arrays[name] = rng.normal(0, (gain / np.prod(shape[1:])) ** 0.5, shape).astype(np.float32)
        elif name.endswith("running_mean"):
            arrays[name] = rng.normal(0, 0.05, shape).astype(np.float32)
        elif name.endswith("weight"):
            arrays[name] = rng.uniform(0.9, 1.4, shape).astype(np.float32)
    return arrays


def image(seed, size=300):
    """A smooth colorful picture (size, size, 3) uint8 RGB; at 300 it needs no resampling."""
    rng = np.random.default_rng([3, seed])
    y, x = np.mgrid[0:size, 0:size] / size
    planes = []
    for _ in range(3):
        plane = np.zeros((size, size))
        for _ in range(6):
            fx, fy, phase = rng.uniform(0, 40), rng.uniform(0, 40), rng.uniform(0, 6.28)
            plane += np.sin(fx * x + fy * y + phase)
        planes.append(plane)
    picture = np.stack(planes, axis=-1)
    picture = (picture - picture.min()) / (picture.max() - picture.min())
    return (picture * 255).round().astype(np.uint8)
