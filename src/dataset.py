"""COCO annotations -> samples, and the sampler that gives each process its share of an epoch."""

import contextlib
import gc
import io
import json
import math
import os
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from pycocotools.coco import COCO
from torch.utils.data import Dataset

from src.transform import augment, picture_size, read_image, resize
from src.usage import UnreadablePicture, UserError


@contextlib.contextmanager
def no_garbage_collection():
    """Millions of objects are made here, none is garbage: do not search them again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class CocoDataset(Dataset):
    """Pictures and boxes of DATA_PATH/annotations/instances_SET.json and DATA_PATH/SET/.

    With an encoder: dataset[(epoch, index)] -> image (300, 300, 3) uint8, augmented, loc_targets
    (D, 4) float32, cls_targets (D,) int64, image_id. Without: dataset[index] -> image (300, 300,
    3) uint8, image_id, size (2,) float32 (width, height) in pixels.

    `classes` are the names, index 0 "background"; label k is COCO category `category_ids[k - 1]`.
    """

    @no_garbage_collection()
    def __init__(self, data_path, set_name, encoder=None, seed=0, zoom_out=False):
        self.folder = Path(data_path) / set_name
        self.annotation_file = annotation_file(data_path, set_name)
        self.encoder, self.seed, self.zoom_out = encoder, seed, zoom_out
        data, self.repairs = read_annotations(self.annotation_file)
        categories = sorted(data["categories"], key=lambda category: category["id"])
        self.category_ids = [category["id"] for category in categories]
        self.classes = ["background"] + [category["name"] for category in categories]
        # Arrays, not Python objects: those would be copied into every worker, page by page, as
        # their reference counts change.
        images = sorted(data["images"], key=lambda image: image["id"])
        self.image_ids = np.array([image["id"] for image in images], np.int64)
        self.sizes = np.array([(i["width"], i["height"]) for i in images], np.int32).reshape(-1, 2)
        self.file_names = np.array([os.fsencode(image["file_name"]) for image in images])
        self._collect_boxes(data["annotations"])
        missing = self._missing_pictures()
        if missing:
            raise UserError(
                f"{self.annotation_file}: {len(missing)} of its {len(images)} pictures are not in"
                f" {self.folder}, the first is {missing[0]}: copy them there"
            )

    def _collect_boxes(self, annotations):
        """Objects to train on, by picture: those of picture i are rows starts[i] to starts[i+1]."""
        annotations = [a for a in annotations if not a["iscrowd"]]
        ids = np.array([a["image_id"] for a in annotations], np.int64)
        labels = np.array([a["category_id"] for a in annotations], np.int64)
        boxes = np.array([a["bbox"] for a in annotations], np.float64).reshape(-1, 4)
        rows = np.searchsorted(self.image_ids, ids)
        order = np.argsort(rows, kind="stable")
        boxes[:, 2:] += boxes[:, :2]  # xywh -> xyxy
        boxes /= np.tile(self.sizes[rows], 2)
        self.boxes = boxes.astype(np.float32)[order]
        self.labels = (np.searchsorted(self.category_ids, labels) + 1)[order]
        self.starts = np.searchsorted(rows[order], np.arange(len(self.image_ids) + 1))

    def _missing_pictures(self):
        return [name for name in map(os.fsdecode, self.file_names) if not (self.folder / name).is_file()]

    def __len__(self):
        return len(self.image_ids)

    def __getitem__(self, key):
        if self.encoder is None:
            image, size = self.read(key), self.sizes[key].astype(np.float32)
            return resize(image), self.image_ids[key], size
        epoch, index = key
        # Seeded by what it is, not by when or where it is made: a resumed run sees the same.
        rng = np.random.default_rng((self.seed, epoch, index))
        boxes, labels = self.objects(index)
        image, boxes, labels = augment(self.read(index), boxes, labels, rng, self.zoom_out)
        targets = self.encoder.encode(torch.from_numpy(boxes), torch.from_numpy(labels))
        return image, *targets, self.image_ids[index]

    def objects(self, index):
        """Boxes (G, 4) float32 xyxy in [0, 1] and labels (G,) int64 of picture `index`."""
        rows = slice(self.starts[index], self.starts[index + 1])
        return self.boxes[rows], self.labels[rows]

    def read(self, index):
        """Picture `index` as (H, W, 3) uint8 RGB, turned the way its annotations are."""
        path, (width, height) = self.path(index), self.sizes[index].tolist()
        image = read_image(path)
        if image.shape[:2] != (height, width):  # annotated without regard to EXIF, perhaps
            upright = image.shape
            image = read_image(path, upright=False)
            if image.shape[:2] != (height, width):
                raise UnreadablePicture(
                    f"{path} is {upright[1]}x{upright[0]} pixels, but {width}x{height} in"
                    f" {self.annotation_file}: correct one of them"
                )
        return image

    def path(self, index):
        """File of picture `index`."""
        return self.folder / os.fsdecode(self.file_names[index])

    def check_sizes(self, indices):
        """UnreadablePicture if one of these pictures is not of the size in the annotation file.

        Opens the files, but decodes only those whose header shows another size (EXIF turns them).
        """
        for index in indices:
            if picture_size(self.path(index)) != tuple(self.sizes[index].tolist()):
                self.read(index)


def check_categories(data, category_ids, classes, source):
    """UserError if CocoDataset `data` has a category that is not among these, by id and name."""
    known = dict(zip(category_ids, classes[1:], strict=True))
    for category, name in zip(data.category_ids, data.classes[1:], strict=True):
        if known.get(category) != name:
            there = f"is {known[category]!r}" if category in known else "does not exist"
            raise UserError(
                f"{data.annotation_file}: its category {category}, {name!r}, {there} in {source}:"
                " ids and names must agree"
            )


def annotation_file(data_path, set_name):
    """Where COCO keeps the boxes of `set_name`; UserError if it is not there."""
    path = Path(data_path) / "annotations" / f"instances_{set_name}.json"
    if not path.is_file():
        raise UserError(f"{path}: no such file; --data-path must hold annotations/ and {set_name}/")
    return path


def read_annotations(path):
    """Read a COCO annotation file and repair what can be: returns it and a Counter of repairs.

    Clipped: boxes reaching outside their picture. Left out: boxes of no area or NaN. Derived:
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
    repairs["crowd regions not trained on"] = sum(a["iscrowd"] for a in data["annotations"])
    return data, +repairs  # without what was counted 0 times


def check_entries(path, data, sizes):
    """Every picture once, and every annotation on a known picture and of a known category."""
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
            raise UserError(f"{path}: id {twice} stands twice in its {kind}: remove one")
    names = Counter(category["name"] for category in data["categories"])
    for name in names:
        if names[name] > 1:
            same = [category["id"] for category in data["categories"] if category["name"] == name]
            raise UserError(f"{path}: categories {same} are all called {name!r}: rename or merge")
    for image_id, size in sizes.items():
        if not all(isinstance(v, (int, float)) and 0 < v < 2**31 and v == int(v) for v in size):
            raise UserError(f"{path}: image {image_id} has the size {size}: give its pixels")
    for annotation in data["annotations"]:
        if annotation["category_id"] not in categories:
            raise UserError(f"{path}: unknown category_id {annotation['category_id']}: add it")
        if annotation["image_id"] not in sizes:
            raise UserError(f"{path}: unknown image_id {annotation['image_id']}: add the image")


def repair(annotation, size, repairs):
    """Mend one annotation in place and count it; False if it has to be left out."""
    if not all(isinstance(value, (int, float)) for value in annotation["bbox"]):
        raise TypeError(f"bbox {annotation['bbox']}")
    x, y, w, h = map(float, annotation["bbox"] or [math.nan] * 4)
    left, top = max(x, 0.0), max(y, 0.0)
    right, bottom = min(x + w, size[0]), min(y + h, size[1])
    if not (right - left > 0.01 and bottom - top > 0.01):  # pixels; NaN comes here too
        repairs["boxes of no area left out"] += 1
        return False
    if x < -1 or y < -1 or x + w > size[0] + 1 or y + h > size[1] + 1:  # more than rounding
        repairs["boxes clipped to their picture"] += 1
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


class TrainSampler:
    """Batches of (epoch, index) keys for one process; a new shuffle every epoch.

    The incomplete last global batch is dropped. `start(epoch, samples_seen)` sets what the next
    iteration yields: an epoch stopped midway goes on with the samples it has not seen, whatever
    the number of processes was.
    """

    def __init__(self, num_samples, batch_size, rank=0, world_size=1, seed=0):
        if num_samples < batch_size * world_size:
            largest = num_samples // world_size
            remedy = "more pictures: a batch has at least 2"  # batch norm needs them
            if largest > 1:
                remedy = f"--batch-size {largest} or less"
            elif num_samples > 1:
                remedy = "fewer processes"
            raise UserError(
                f"{num_samples} training pictures are less than one batch of {batch_size} x"
                f" {world_size} processes: use {remedy}"
            )
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.start(epoch=0)

    def start(self, epoch, samples_seen=0):
        """Go to sample `samples_seen` (over all processes) of `epoch`."""
        self.epoch, self.samples_seen = epoch, samples_seen

    def __len__(self):
        left = max(0, self.num_samples - self.samples_seen)
        return left // (self.batch_size * self.world_size)

    def __iter__(self):
        shuffled = np.random.default_rng((self.seed, self.epoch)).permutation(self.num_samples)
        left = shuffled[self.samples_seen :].tolist()
        per_step = self.batch_size * self.world_size
        for first in range(0, len(self) * per_step, per_step):
            batch = left[first + self.rank : first + per_step : self.world_size]
            yield [(self.epoch, index) for index in batch]
