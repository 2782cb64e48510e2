"""COCO annotations -> samples, and the sampler that gives each process its share of an epoch."""

import os
import unicodedata
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from src import distributed
from src.annotations import annotation_file, no_garbage_collection, read_annotations, trained_on
from src.boxes import MATCHING_IOU
from src.classes import names_by_id, to_labels
from src.images import image_size, read_image
from src.transform import augment, resize
from src.usage import UnreadableImage, UserError, quoted


class CocoDataset(Dataset):
    """Images and boxes of DATA_PATH/annotations/instances_SET.json and DATA_PATH/SET/.

    With an encoder: dataset[(epoch, index)] -> image (size, size, 3) uint8, augmented, loc_targets
    (D, 4) float32, cls_targets (D,) int64, image_id. Without: dataset[index] -> image (size, size, 3)
    uint8, image_id, width and height (2,) float32 of the file in pixels.

    `classes` are the names, index 0 "background"; label k is COCO category `category_ids[k - 1]`.
    """

    @no_garbage_collection()  # while millions of annotations are parsed
    def __init__(self, data_path, set_name, encoder=None, seed=0, zoom_out=False, size=300, mirror=True):
        self.folder = Path(data_path) / set_name
        self.annotation_file = annotation_file(data_path, set_name)
        self.encoder = encoder
        self.seed = seed
        self.zoom_out = zoom_out
        self.size = size
        self.mirror = mirror  # half of the samples
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

    def _collect_boxes(self, annotations):
        """Objects to train on, by image: those of image i are rows starts[i] to starts[i+1]."""
        annotations = [a for a in annotations if trained_on(a)]
        ids = np.array([a["image_id"] for a in annotations], np.int64)
        categories = np.array([a["category_id"] for a in annotations], np.int64)
        boxes = np.array([a["bbox"] for a in annotations], np.float64).reshape(-1, 4)
        rows = np.searchsorted(self.image_ids, ids)
        order = np.argsort(rows, kind="stable")
        boxes[:, 2:] += boxes[:, :2]  # xywh -> xyxy
        boxes /= np.tile(self.sizes[rows], 2)
        self.boxes = boxes.astype(np.float32)[order]
        self.labels = to_labels(categories, self.category_ids)[order]
        self.starts = np.searchsorted(rows[order], np.arange(len(self.image_ids) + 1))

    def __len__(self):
        return len(self.image_ids)

    def describe(self, name, encoder=None):
        """What the set holds and what was repaired, in one line; each remark on it in one more.

        With an encoder: one on how many of its boxes overlap a default box enough to be matched to it.
        """
        lines = [f"{count} {what}" for what, count in self.repairs.items()]
        repairs, remarks = ([line for line in lines if (": " in line) == is_remark] for is_remark in (False, True))
        holds = f"{len(self)} images, {len(self.boxes)} boxes of {len(self.classes) - 1} classes"
        if empty := int((np.diff(self.starts) == 0).sum()):
            repairs.insert(0, f"{empty} images without boxes")
        if encoder and len(self.boxes):
            sample = self.boxes[:: -(-len(self.boxes) // 2000)]  # enough, and soon done
            share = encoder.fits(torch.from_numpy(sample)).float().mean().item()
            remarks.append(f"{share:.0%} of the boxes have an IoU above {MATCHING_IOU} with a default box")
            if share < 0.5:
                remarks[-1] += ": few of the others will be found; tiles help, and --model ssd instead of ssdlite"
        return "\n".join(f"{name}: {line}" for line in [", ".join([holds, *repairs]), *remarks])

    def __getitem__(self, key):
        if self.encoder is None:
            image = resize(self.read(key), self.size)
            return image, self.image_ids[key], self.sizes[key].astype(np.float32)
        epoch, index = key  # the epoch is part of the key because workers outlive it
        # Seeded by (seed, epoch, index): independent of worker, process and restarts.
        rng = np.random.default_rng((self.seed, epoch, index))
        boxes, labels = self.objects(index)
        image, boxes, labels = augment(self.read(index), boxes, labels, rng, self.size, self.zoom_out, self.mirror)
        targets = self.encoder.encode(torch.from_numpy(boxes), torch.from_numpy(labels))
        return image, *targets, self.image_ids[index]

    def objects(self, index):
        """Boxes (G, 4) float32 xyxy in [0, 1] and labels (G,) int64 of image `index`."""
        rows = slice(self.starts[index], self.starts[index + 1])
        return self.boxes[rows], self.labels[rows]

    def read(self, index):
        """Image `index` as (H, W, 3) uint8 RGB, turned the way its annotations are."""
        path = self.path(index)
        width, height = self.sizes[index].tolist()
        image = read_image(path)
        if image.shape[:2] != (height, width):  # the annotator may have ignored the EXIF orientation
            upright = image.shape
            image = read_image(path, upright=False)
            if image.shape[:2] != (height, width):
                raise UnreadableImage(
                    f"{path} is {upright[1]}x{upright[0]} pixels, but {width}x{height} in"
                    f" {self.annotation_file}: correct one of them"
                )
        return image

    def path(self, index):
        """File of image `index`."""
        return self.folder / os.fsdecode(self.file_names[index])

    def check_folder(self):
        """UserError if there is no folder of images."""
        if not self.folder.is_dir():
            raise UserError(f"{self.folder}: no such folder; --data-path must hold annotations/ and it")

    def check_files(self, name):
        """UserError if an image of this process's share is missing, or not of the size in the annotation file.

        Opens the files, but decodes only those whose header shows another size (EXIF turns them).
        name: of the set, for the progress bar.
        """
        missing = []
        share = range(distributed.rank(), len(self), distributed.world_size())
        for index in tqdm(share, f"checking {name} images", disable=not distributed.is_main_process(), leave=False):
            path = self.path(index)
            if not os.path.isfile(path):  # path.is_file() fails on a name that is too long
                missing.append(os.fsdecode(self.file_names[index]))
            elif image_size(path) != tuple(self.sizes[index].tolist()):
                self.read(index)
        if missing:
            raise UserError(
                f"{self.annotation_file}: at least {len(missing)} of its {len(self)} images are not in"
                f" {self.folder}, the first is {quoted(missing[0])}: copy them there" + self.name_like(missing[0])
            )

    def name_like(self, name):
        """For the message about a missing file: the name of one there that looks the same."""
        plain = lambda text: unicodedata.normalize("NFKC", text).strip().casefold()  # noqa: E731
        folder, name = os.path.split(self.folder / name)
        names = os.listdir(folder) if os.path.isdir(folder) else []
        alike = [quoted(other) for other in names if plain(other) == plain(name)]
        return f" (there is {alike[0]}: rename one)" if alike else ""


def check_categories(data, category_ids, classes, source):
    """UserError if CocoDataset `data` has a category that is not among these, by id and name."""
    known = names_by_id(category_ids, classes)
    for category, name in names_by_id(data.category_ids, data.classes).items():
        if known.get(category) != name:
            there = f"is {quoted(known[category])}" if category in known else "does not exist"
            raise UserError(
                f"{data.annotation_file}: its category {category}, {quoted(name)}, {there} in {source}:"
                " ids and names must agree"
            )


class TrainSampler:
    """Batches of (epoch, index) keys for one process; a new shuffle every epoch.

    The incomplete last global batch is dropped. `start(epoch, samples_seen)` sets what the next
    iteration yields: an epoch stopped midway continues with the samples it has not seen, whatever
    the number of processes was.
    """

    def __init__(self, num_samples, batch_size, rank=0, world_size=1, seed=0):
        if num_samples < batch_size * world_size:
            largest = num_samples // world_size
            remedy = "more images: a batch has at least 2"  # batch norm needs them
            if largest > 1:
                remedy = f"--batch-size {largest} or less"
            elif num_samples > 1:
                remedy = "fewer processes"
            raise UserError(
                f"{num_samples} training images are less than one batch of {batch_size} x"
                f" {world_size} processes: use {remedy}"
            )
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
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
