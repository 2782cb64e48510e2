"""Files damaged at random: each is read, or refused with a UserError; nothing else may happen.

    FILES=5000 python -m pytest tests/test_fuzz.py

tries 5000 of each kind instead of a few hundred.
"""

import copy
import io
import json
import os
import random
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from src.annotations import load_ground_truth
from src.boxes import Encoder, make_default_boxes
from src.checkpoint import load_checkpoint
from src.dataset import CocoDataset
from src.images import image_size, read_image
from src.usage import UserError

FILES = int(os.environ.get("FILES", 300))
ODD = (
    None, True, False, 0, -1, 10**30, -(10**30), 0.5, float("nan"), float("inf"), "", "7", "é\n",
    "../x", [], [1], [[1, 2, 3, 4]], {}, {"id": 1}, [0, 0, -5, 1e9], [float("nan")] * 4, ["a"] * 4,
)  # fmt: skip


def outcome(action, *args):
    """ "read" or "refused"; whatever else is raised goes through."""
    try:
        action(*args)
    except UserError as error:
        assert str(error), "an error without a word"
        return "refused"
    return "read"


def report(what, outcomes):
    assert len(outcomes) == FILES and {"read", "refused"} == set(outcomes)  # both were tried
    print(f"{FILES} {what}: {outcomes.count('read')} read, {outcomes.count('refused')} refused")


def damage(data, rng):
    """Bytes with a few bits turned, cut short, or with a stretch missing or doubled."""
    data = bytearray(data)
    kind = rng.randrange(4)
    start, length = rng.randrange(len(data)), rng.randrange(1, 50)
    if kind == 0:
        for _ in range(rng.randrange(1, 9)):
            # Half of them in the head, where the formats keep their sizes and tables.
            at = rng.randrange(min(len(data), rng.choice([100, len(data)])))
            data[at] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del data[start:]
    elif kind == 2:
        del data[start : start + length]
    else:
        data[start:start] = data[start : start + length]
    return bytes(data)


def places(node):
    """Every (container, key) of a JSON document."""
    pairs = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in list(pairs):
        yield node, key
        if isinstance(value, (dict, list)):
            yield from places(value)


def damage_document(document, rng):
    """A copy with one to three values replaced by odd ones, taken out or doubled."""
    document = copy.deepcopy(document)
    for _ in range(rng.randrange(1, 4)):
        found = list(places(document))
        if not found:
            break
        node, key = rng.choice(found)
        kind = rng.randrange(4)
        if kind == 0:
            del node[key]
        elif kind == 1 and isinstance(node, list):
            node.append(copy.deepcopy(node[key]))
        else:
            node[key] = copy.deepcopy(rng.choice(ODD))
    return document


def test_damaged_annotations(tmp_path, shapes_folder):
    rng = random.Random(0)
    whole = json.loads((shapes_folder / "annotations" / "instances_val2017.json").read_text())
    for annotation in whole["annotations"]:  # long, and read by nobody here
        annotation.pop("segmentation")
    (tmp_path / "annotations").mkdir()
    (tmp_path / "set").symlink_to(shapes_folder / "val2017")
    file = tmp_path / "annotations" / "instances_set.json"
    encoder = Encoder(make_default_boxes("ssdlite"))

    def use():
        data = CocoDataset(tmp_path, "set", encoder)
        data.check_files("set")
        _, loc_targets, cls_targets, _ = data[0, rng.randrange(len(data))]
        assert loc_targets.isfinite().all() and cls_targets.max() < len(data.classes)
        ground_truth = load_ground_truth(file)
        assert all(np.isfinite(annotation["bbox"]).all() for annotation in ground_truth.anns.values())

    outcomes = []
    for number in range(FILES):
        if number % 4:
            text = json.dumps(damage_document(whole, rng)).encode()
        else:
            text = damage(json.dumps(whole).encode(), rng)
        file.write_bytes(text)
        outcomes.append(outcome(use))
    report("annotation files", outcomes)


def pictures():
    """One small file in each of the formats that people keep images in."""
    ramp = np.add.outer(np.arange(40), np.arange(50))[..., None] * [1, 2, 3] % 256
    picture = Image.fromarray(ramp.astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    exif.update({0x010F: "a maker", 0x0128: 2, 0x011A: 72.0, 0x0132: "2026:11:25 12:00:00"})
    for kind, options in (
        ("JPEG", {"exif": exif}),
        ("JPEG", {"progressive": True}),
        ("PNG", {}),
        ("PNG", {"exif": exif}),
        ("GIF", {}),
        ("WEBP", {}),
        ("BMP", {}),
        ("TIFF", {"compression": "tiff_deflate"}),
    ):
        file = io.BytesIO()
        picture.save(file, kind, **options)
        yield file.getvalue()


@pytest.mark.filterwarnings("ignore")  # Pillow and libtiff say what they think of such files
def test_damaged_images(tmp_path):
    rng = random.Random(1)
    files = list(pictures())
    outcomes = []
    path = tmp_path / "picture"
    for number in range(FILES):
        path.write_bytes(damage(files[number % len(files)], rng))
        outcomes.append(outcome(read_image, path))
        if outcomes[-1] == "read":
            image = read_image(path)
            assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
            assert image_size(path) in (image.shape[1::-1], image.shape[:2])
        else:
            outcome(image_size, path)
    report("pictures", outcomes)


def test_damaged_checkpoints(tmp_path):
    rng = random.Random(2)
    files = []
    outcomes = []
    state = {
        "model": "ssdlite", "model_state_dict": {"weight": torch.ones(3, 3)},
        "classes": ["background", "a"], "category_ids": [1],
    }  # fmt: skip
    for zipped in (True, False):
        file = io.BytesIO()
        torch.save(state, file, _use_new_zipfile_serialization=zipped)
        files.append(file.getvalue())
    path = tmp_path / "checkpoint.pth"
    for number in range(FILES):
        path.write_bytes(damage(files[number % 2], rng))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outcomes.append(outcome(load_checkpoint, path))
    report("checkpoints", outcomes)
