"""What several test files share: sample images, boxes, data sets, batches, and networks with reference weights."""

import bisect
import json
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from reference.inputs import image as reference_image
from reference.inputs import lite_weights, weights

from src.classes import to_labels
from src.model import build_model

MODELS = ("ssd", "ssdlite")
ONE_OBJECT = [(0.15, 0.1, 0.85, 0.8)]  # xyxy in [0, 1]
THREE_OBJECTS = [(0.1, 0.2, 0.45, 0.6), (0.5, 0.5, 0.9, 0.95), (0.3, 0.4, 0.7, 0.75)]
CATEGORIES = [{"id": 44, "name": "cup"}, {"id": 2, "name": "cat"}, {"id": 7, "name": "dog"}]


def scene(height=150, width=200):
    """A colorful image: gradients, a rectangle, some noise."""
    y, x = np.mgrid[:height, :width]
    image = np.stack([x * 255 / width, y * 255 / height, 255 - (x + y) * 255 / (width + height)])
    image[:, height // 4 : height // 2, width // 3 : width // 2] = np.reshape([220, 40, 90], (3, 1, 1))
    noise = np.random.default_rng(0).normal(0, 6, image.shape)
    return (image + noise).clip(0, 255).astype(np.uint8).transpose(1, 2, 0).copy()


def box(image_id, bbox, category_id=7, **more):
    """A complete annotation."""
    area = {"area": bbox[2] * bbox[3], "iscrowd": 0}
    return {"image_id": image_id, "category_id": category_id, "bbox": bbox, **area, **more}


def small_dataset(folder, annotations=(), images=None, categories=CATEGORIES):
    """Make a data set `set` in `folder`, by default two images of 100x50, ids 20 and 10; return its JSON file."""
    if images is None:
        images = [
            {"id": 20, "file_name": "b.jpg", "width": 100, "height": 50},
            {"id": 10, "file_name": "a.jpg", "width": 100, "height": 50},
        ]
    annotations = [{"id": i} | a for i, a in enumerate(annotations, start=1)]
    file = folder / "annotations" / "instances_set.json"
    file.parent.mkdir(parents=True)
    content = {"images": images, "annotations": annotations, "categories": categories}
    file.write_text(json.dumps(content))
    for image in images:
        path = folder / "set" / image["file_name"]
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (int(image["width"]), int(image["height"])), (200, 30, 30)).save(path)
    return file


def voc_image(kit, year, stem, objects, size=(200, 100), ending=".jpg"):
    """One image of a VOC development kit and its XML; objects are (name, difficult, corners), as VOC writes them."""
    folder = kit / f"VOC{year}"
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (9, 99, 199)).save(folder / "JPEGImages" / f"{stem}{ending}")
    corners = "<xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax>"
    nodes = "".join(
        f"<object><name>{name}</name><pose>Left</pose><difficult>{difficult}</difficult>"
        f"<bndbox>{corners.format(*box)}</bndbox><part><name>head</name><bndbox/></part></object>"
        for name, difficult, box in objects
    )
    size = f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>"
    (folder / "Annotations" / f"{stem}.xml").write_text(f"<annotation>{size}{nodes}</annotation>")


def voc_list(kit, year, name, text):
    """A list of a VOC development kit."""
    (kit / f"VOC{year}" / "ImageSets" / "Main" / f"{name}.txt").write_text(text)


def tensors(boxes, labels):
    """Objects as `Encoder.encode` takes them: boxes (G, 4) float32, labels (G,) int64."""
    return torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), torch.tensor(labels).long()


def as_detections(rows, category_ids):
    """Rows (N, 7) of image id, x, y, w, h, score, category id as `engine.evaluate` returns detections."""
    rows = torch.from_numpy(np.array(rows, float).reshape(-1, 7))
    detections = {}
    for image_id in rows[:, 0].unique().long().tolist():
        _, x, y, w, h, scores, ids = rows[rows[:, 0] == image_id].T
        boxes, labels = torch.stack([x, y, x + w, y + h], dim=1), to_labels(ids.numpy(), category_ids)
        detections[image_id] = {"boxes": boxes, "labels": torch.from_numpy(labels), "scores": scores}
    return detections


def certain_logits(cls_targets, num_classes):
    """Logits (1, D, C) that make each default box's class in cls_targets (D,) nearly certain."""
    return 20.0 * torch.nn.functional.one_hot(cls_targets, num_classes)[None].float()


def random_batch(matched, num_defaults=60, num_classes=5, seed=0):
    """loc and cls_logits, which collect gradients, and their targets; image b has matched[b] matched boxes."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(matched), num_defaults)
    loc, loc_targets = torch.randn(2, *shape, 4, generator=generator)
    cls_logits = torch.randn(*shape, num_classes, generator=generator)
    cls_targets = torch.zeros(shape, dtype=torch.int64)
    for b, count in enumerate(matched):
        chosen = torch.randperm(num_defaults, generator=generator)[:count]
        cls_targets[b, chosen] = torch.randint(1, num_classes, (count,), generator=generator)
    return loc.requires_grad_(), cls_logits.requires_grad_(), loc_targets, cls_targets


def reference_network(name, num_classes=81):
    """A network in eval mode with reference weights; its batch norms are far from the identity."""
    model = build_model(name, num_classes, pretrained_backbone=False).eval()
    shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
    model.load_state_dict({key: torch.from_numpy(v) for key, v in weights(shapes).items()})
    return model


def mb2_ssd_lite():
    """Reference weights under the names of qfgaohao/pytorch-ssd's mb2-ssd-lite, for VOC's classes."""
    names = Path(__file__).parent / "reference" / "ssdlite_mobilenetv2_state_dict.json"
    arrays = lite_weights(json.loads(names.read_text()))
    return {name: torch.from_numpy(values) for name, values in arrays.items()}


def forward(model, images):
    """What a network answers, without gradients."""
    with torch.inference_mode():
        return model(images)


def reference_images(count):
    """Reference images (count, 3, 300, 300), normalized with ImageNet's mean and standard deviation."""
    pixels = torch.from_numpy(np.stack([reference_image(seed) for seed in range(count)])).float() / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return ((pixels - mean) / std).permute(0, 3, 1, 2).contiguous()


def kolmogorov_smirnov(a, b):
    """Largest distance between two samples' distributions, and what chance lets it exceed once in 10^6 times."""
    a, b = sorted(a), sorted(b)
    share = lambda values, x: bisect.bisect_right(values, x) / len(values)  # noqa: E731
    distance = max(abs(share(a, x) - share(b, x)) for x in [*a, *b])
    return distance, math.sqrt(-math.log(1e-6 / 2) / 2 * (len(a) + len(b)) / (len(a) * len(b)))
