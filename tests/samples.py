"""Sample images and COCO data sets that several test files share."""

import json

import numpy as np
from PIL import Image

CATEGORIES = [{"id": 44, "name": "cup"}, {"id": 2, "name": "cat"}, {"id": 7, "name": "dog"}]


def scene(height=150, width=200):
    """A colourful image: gradients, a rectangle, some noise."""
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
