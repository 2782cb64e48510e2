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

from src.usage import UserError, is_lfs_pointer, quoted


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
    """Read a COCO annotation file and repair what can be: returns it and a Counter of repairs, and of remarks.

    Turned round: boxes of negative width or height. Clipped: boxes reaching outside their image. Left
    out: boxes of no area or NaN. Derived: missing iscrowd, and area where it is missing or 0.
    Renumbered: annotation ids doubled or 0 (pycocotools takes id 0 for "unmatched"). Raises UserError
    where the file contradicts itself.
    """
    try:
        data = json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        what = "a Git LFS pointer: run git lfs pull" if is_lfs_pointer(path) else f"not a JSON file ({error})"
        raise UserError(f"{path}: {what}") from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(data, dict) or not isinstance(data.get(key), list):
            raise UserError(f"{path}: has no list {key!r}, as COCO's object detection files do")
    sizes, categories = check_entries(path, data)
    repairs = Counter()
    kept = []
    for index, annotation in enumerate(data["annotations"]):
        try:
            for key, known in (("category_id", categories), ("image_id", sizes)):
                if type(annotation[key]) not in (int, float) or annotation[key] not in known:
                    raise ValueError(f"unknown {key} {quoted(annotation[key])}: add it")
            if repair(annotation, sizes[annotation["image_id"]], repairs):
                kept.append(annotation)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise wrong_entry(path, "annotations", index, annotation, error) from error
    data["annotations"] = kept
    if kept and all(max(a["bbox"]) < 2 for a in kept):
        raise UserError(
            f"{path}: the numbers of all its boxes are below 2: give bbox as left, top, width and"
            " height in pixels, not as fractions of the image"
        )
    ids = [annotation.get("id", 0) for annotation in kept]
    if not all(whole(i) and 0 < abs(i) < 2**53 for i in ids) or len(set(ids)) < len(ids):
        repairs["annotation ids renumbered"] = len(kept)
        for number, annotation in enumerate(kept, start=1):
            annotation["id"] = number
    repairs["crowd regions not trained on"] = sum(not trained_on(a) for a in kept)
    repairs["difficult objects not evaluated"] = sum(a["iscrowd"] and trained_on(a) for a in kept)
    remark(data, repairs)
    return data, +repairs  # without what was counted 0 times


def check_entries(path, data):
    """Check images and categories: returns the images' sizes by id, and the categories' ids."""
    if not data["images"] or not data["categories"]:
        raise UserError(f"{path}: has no images or no categories: there is nothing to detect")
    for kind in ("images", "categories"):
        for index, entry in enumerate(data[kind]):
            try:
                check_entry(kind, entry)
            except (KeyError, TypeError, ValueError) as error:
                raise wrong_entry(path, kind, index, entry, error) from error
        (twice, count), *_ = Counter(entry["id"] for entry in data[kind]).most_common(1)
        if count > 1:
            raise UserError(f"{path}: id {twice} is duplicated in its {kind}: remove one")
    names = Counter(category["name"] for category in data["categories"])
    for name in names:
        if names[name] > 1:
            same = [category["id"] for category in data["categories"] if category["name"] == name]
            raise UserError(f"{path}: categories {same} are all called {quoted(name)}: rename or merge")
    sizes = {image["id"]: (image["width"], image["height"]) for image in data["images"]}
    return sizes, {category["id"] for category in data["categories"]}


def check_entry(kind, entry):
    """Raise a KeyError or a ValueError that says what is wrong with one of the "images" or "categories"."""
    # Larger ids would not survive in a float, which pycocotools makes of them.
    if not (whole(entry["id"]) and abs(entry["id"]) < 2**53):
        raise ValueError(f"id {quoted(entry['id'])}: number them, below 2**53")
    entry["id"] = int(entry["id"])
    key, encode = ("file_name", os.fsencode) if kind == "images" else ("name", str.encode)
    if not (isinstance(entry[key], str) and entry[key].strip()):
        raise ValueError(f"{key} {quoted(entry[key])}: give it a name")
    try:
        encode(entry[key])
    except UnicodeEncodeError as error:
        raise ValueError(f"half a character in its {key}: write the file in UTF-8") from error
    if kind == "images":
        size = entry["width"], entry["height"]
        if not all(whole(v) and 0 < v < 2**31 for v in size):
            shown = " and ".join(map(quoted, size))
            raise ValueError(f"width and height are {shown}; they must be positive whole numbers")


def whole(value):
    """True for whole numbers, as int or float."""
    return type(value) in (int, float) and value == value // 1


def wrong_entry(path, kind, index, entry, error):
    """The UserError for an `error` in entry `index` of the file's list `kind`: says which it is."""
    if not isinstance(entry, dict):
        return UserError(f"{path}: {kind}[{index}] is {quoted(entry)}, not an object with keys")
    named = "".join(f", {key} {quoted(entry[key])}" for key in ("id", "file_name", "name") if key in entry)
    what = f"has no {error}: add it" if isinstance(error, KeyError) else error
    return UserError(f"{path}: {kind}[{index}]{named}: {what}")


def repair(annotation, size, repairs):
    """Repair one annotation in place and count it; False if it has to be left out."""
    bbox = annotation["bbox"]
    if not (isinstance(bbox, list) and len(bbox) in (0, 4) and all(isinstance(v, (int, float)) for v in bbox)):
        raise ValueError(f"bbox {quoted(bbox)}: give left, top, width and height, upright")
    x, y, w, h = map(float, bbox or [math.nan] * 4)
    if w < 0 or h < 0:
        x, y, w, h = annotation["bbox"] = [min(x, x + w), min(y, y + h), abs(w), abs(h)]
        repairs["boxes drawn right to left or upwards turned round"] += 1
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
    if not (type(area) in (int, float) and 0 < area <= 2 * w * h):  # tools without masks write 0; no mask is larger
        annotation["area"] = (right - left) * (bottom - top)
        repairs["missing areas derived"] += 1
    if annotation.get("iscrowd") is None:
        annotation["iscrowd"] = 0
        repairs["missing iscrowd taken as 0"] += 1
    if annotation["iscrowd"] not in (0, 1):
        raise ValueError(f"iscrowd {quoted(annotation['iscrowd'])}: give 0 or 1")
    return True


def trained_on(annotation):
    """False for a crowd. VOC's difficult objects are crowds (tools/voc.py) that the paper's code trains on."""
    return not annotation["iscrowd"] or annotation.get("difficult") == 1


def remark(data, repairs):
    """Count what cannot be repaired but is hardly meant, under its likely cause: "what: cause"."""
    boxes = {(a["image_id"], a["category_id"], a["iscrowd"], *map(round, a["bbox"])) for a in data["annotations"]}
    again = "boxes are the same as another of their class: merged exports? Each counts as an object: remove them"
    repairs[again] = len(data["annotations"]) - len(boxes)
    files = {os.path.normpath(image["file_name"]) for image in data["images"]}
    again = "image entries repeat a file: merged exports? Give each file one entry, with all its boxes"
    repairs[again] = len(data["images"]) - len(files)
    clipped = repairs["boxes clipped to their image"]
    if 2 * clipped > len(data["annotations"]):
        repairs["boxes, more than half, were clipped: are they corners? bbox is left, top, width and height"] = clipped


@no_garbage_collection()
def load_ground_truth(path):
    """The repaired annotations as pycocotools wants them."""
    return as_coco(read_annotations(path)[0])


def as_coco(data):
    """pycocotools' COCO of an annotation file's content, in silence."""
    coco = COCO()
    coco.dataset = data
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco
