"""COCO annotation files: read, check and repair them."""

import contextlib
import gc
import io
import json
import math
import os
from collections import Counter
from pathlib import Path

from pycocotools.coco import COCO

from src.usage import UserError


@contextlib.contextmanager
def no_garbage_collection():
    """Parsing creates millions of objects, none garbage: stop the collector from rescanning them."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def annotation_file(data_path, set_name):
    """Where COCO keeps the boxes of `set_name`; UserError if it is not there."""
    path = Path(data_path) / "annotations" / f"instances_{set_name}.json"
    if not path.is_file():
        raise UserError(f"{path}: no such file; --data-path must hold annotations/ and {set_name}/")
    return path


def read_annotations(path):
    """Read a COCO annotation file and repair what can be: returns it and a Counter of repairs.

    Clipped: boxes reaching outside their image. Left out: boxes of no area or NaN. Derived:
    missing area and iscrowd. Renumbered: annotation ids doubled or 0 (pycocotools takes id 0 for
    "unmatched"). Raises UserError where the file contradicts itself.
    """
    try:
        data = json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a JSON file ({error})") from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(data, dict) or not isinstance(data.get(key), list):
            raise UserError(f"{path}: has no list {key!r}, as COCO's object detection files do")
    try:
        sizes = {image["id"]: (image["width"], image["height"]) for image in data["images"]}
        check_entries(path, data, sizes)
        repairs = Counter()
        data["annotations"] = [a for a in data["annotations"] if repair(a, sizes[a["image_id"]], repairs)]
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{path}: an entry is not in COCO format ({error!r})") from error
    if data["annotations"] and all(max(a["bbox"]) < 2 for a in data["annotations"]):
        raise UserError(
            f"{path}: the numbers of all its boxes are below 2: give bbox as left, top, width and"
            " height in pixels, not as fractions of the image"
        )
    ids = [annotation.get("id", 0) for annotation in data["annotations"]]
    if not all(isinstance(i, int) and i for i in ids) or len(set(ids)) < len(ids):
        repairs["annotation ids renumbered"] = len(data["annotations"])
        for number, annotation in enumerate(data["annotations"], start=1):
            annotation["id"] = number
    repairs["crowd regions not trained on"] = sum(not trained_on(a) for a in data["annotations"])
    repairs["difficult objects not evaluated"] = sum(a["iscrowd"] and trained_on(a) for a in data["annotations"])
    return data, +repairs  # without what was counted 0 times


def check_entries(path, data, sizes):
    """Every image once, and every annotation on a known image and of a known category."""
    if not data["images"] or not data["categories"]:
        raise UserError(f"{path}: has no images or no categories: there is nothing to detect")
    for kind, name in (("images", "file_name"), ("categories", "name")):
        for entry in data[kind]:
            # Larger ids would not survive in a float, which pycocotools makes of them.
            if not (isinstance(entry["id"], int) and abs(entry["id"]) < 2**53):
                raise UserError(f"{path}: {kind} id {entry['id']!r}: number them, below 2**53")
            if not (isinstance(entry.get(name), str) and entry[name].strip()):
                raise UserError(f"{path}: {kind} id {entry['id']} has no {name!r}: add it")
            os.fsencode(entry[name])  # raises on half a character
    categories = {category["id"] for category in data["categories"]}
    for kind, unique in (("images", sizes), ("categories", categories)):
        if len(unique) < len(data[kind]):
            counts = Counter(entry["id"] for entry in data[kind])
            twice = counts.most_common(1)[0][0]
            raise UserError(f"{path}: id {twice} is duplicated in its {kind}: remove one")
    names = Counter(category["name"] for category in data["categories"])
    for name in names:
        if names[name] > 1:
            same = [category["id"] for category in data["categories"] if category["name"] == name]
            raise UserError(f"{path}: categories {same} are all called {name!r}: rename or merge")
    for image_id, size in sizes.items():
        if not all(isinstance(v, (int, float)) and 0 < v < 2**31 and v == int(v) for v in size):
            raise UserError(
                f"{path}: image {image_id}: width and height are {size}; they must be positive whole numbers"
            )
    for annotation in data["annotations"]:
        if annotation["category_id"] not in categories:
            raise UserError(f"{path}: unknown category_id {annotation['category_id']}: add it")
        if annotation["image_id"] not in sizes:
            raise UserError(f"{path}: unknown image_id {annotation['image_id']}: add the image")


def repair(annotation, size, repairs):
    """Repair one annotation in place and count it; False if it has to be left out."""
    if not all(isinstance(value, (int, float)) for value in annotation["bbox"]):
        raise TypeError(f"bbox {annotation['bbox']}")
    x, y, w, h = map(float, annotation["bbox"] or [math.nan] * 4)
    left, top = max(x, 0.0), max(y, 0.0)
    right, bottom = min(x + w, size[0]), min(y + h, size[1])
    if not (right - left > 0.01 and bottom - top > 0.01):  # pixels; NaN comes here too
        repairs["boxes of no area left out"] += 1
        return False
    if x < -1 or y < -1 or x + w > size[0] + 1 or y + h > size[1] + 1:  # more than rounding
        repairs["boxes clipped to their image"] += 1
    if (left, top, right, bottom) != (x, y, x + w, y + h):
        annotation["bbox"] = [left, top, right - left, bottom - top]
    area = annotation.get("area")
    if not (isinstance(area, (int, float)) and 0 <= area < math.inf):
        annotation["area"] = (right - left) * (bottom - top)
        repairs["missing areas derived"] += 1
    if annotation.get("iscrowd") is None:
        annotation["iscrowd"] = 0
        repairs["missing iscrowd taken as 0"] += 1
    if annotation["iscrowd"] not in (0, 1):
        raise ValueError(f"iscrowd {annotation['iscrowd']!r}")
    return True


def trained_on(annotation):
    """False for a crowd. VOC's difficult objects are crowds (tools/voc.py) that the paper's code trains on."""
    return not annotation["iscrowd"] or annotation.get("difficult") == 1


@no_garbage_collection()
def ground_truth(path):
    """The repaired annotations as pycocotools wants them."""
    return as_coco(read_annotations(path)[0])


def as_coco(data):
    """pycocotools' COCO of an annotation file's content, in silence."""
    coco = COCO()
    coco.dataset = data
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco
