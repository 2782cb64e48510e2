"""One labeled set in COCO's format -> train and val, with the same categories.

    python -m tools.split ALL.json OUT --val 0.2 --seed 0

The images of val are drawn at random, but so that each class has an image in both sets, where that can be.
"""

import json
import os
import re
from collections import defaultdict
from pathlib import Path

import numpy as np

from src import usage
from src.annotations import read_annotations
from src.usage import UserError
from tools.voc import link_images


def parse_args():
    parser = usage.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("file", metavar="ALL.json", help="annotations of all images")
    add("out", metavar="OUT", help="folder for annotations/, train/ and val/")
    add("--images", metavar="FOLDER", help="where the file names start; default: the folder of ALL.json")
    add("--val", type=usage.number(float, 0, 1), default=0.2, help="share of the images that go to val")
    add("--seed", type=usage.number(int, 0), default=0, help="of the draw")
    return parser.parse_args()


def main():
    args = parse_args()
    if not os.path.isfile(args.file):
        raise UserError(f"{args.file}: no such file")
    data, repairs = read_annotations(args.file)
    images = sorted(data["images"], key=lambda image: image["id"])
    out = Path(args.out)
    folder = Path(args.images or Path(args.file).parent)
    check_images(images, folder)
    for name in ("train", "val"):
        if os.path.lexists(out / name):
            raise UserError(f"OUT {out}: has {name} already: remove it, or give another OUT")
    outputs = {name: out / "annotations" / f"instances_{name}.json" for name in ("train", "val")}
    usage.prepare_outputs([("OUT", file) for file in outputs.values()], [args.file])
    print("\n".join([f"{args.file}: {len(images)} images", *(f"{count} {what}" for what, count in repairs.items())]))
    data["categories"] = without_groups(data["categories"], {a["category_id"] for a in data["annotations"]})
    in_val = draw(images, data["annotations"], args.val, np.random.default_rng(args.seed))
    for name, file in outputs.items():
        chosen = {image["id"]: image for image in images if (image["id"] in in_val) == (name == "val")}
        names = [image["file_name"] for image in chosen.values()]
        link_images([{"file": folder / file_name, "file_name": file_name} for file_name in names], out / name)
        boxes = [a for a in data["annotations"] if a["image_id"] in chosen]
        file.write_text(json.dumps(data | {"images": list(chosen.values()), "annotations": boxes}))
        present = {a["category_id"] for a in boxes}
        missing = ", ".join(c["name"] for c in data["categories"] if c["id"] not in present) or "none"
        print(f"{name} -> {out / name}: images: {len(chosen)}, boxes: {len(boxes)}, missing classes: {missing}")


def check_images(images, folder):
    """UserError unless all are in `folder`. A file_name that leads elsewhere, as Label Studio's, loses its folders."""
    names = {image["file_name"] for image in images}
    for image in images:
        name = Path(image["file_name"])
        if name.is_absolute() or ".." in name.parts or not os.path.isfile(folder / name):
            image["file_name"] = re.split(r"[/\\]", image["file_name"])[-1]
        if not os.path.isfile(folder / image["file_name"]):
            raise UserError(f"{folder / image['file_name']}: no such image; give the images' folder as --images")
    if len({image["file_name"] for image in images}) < max(2, len(names)):
        raise UserError(f"{folder}: fewer than two images, or of the same name in several folders; add or rename some")


def without_groups(categories, used):
    """The categories but those that Roboflow adds as names of groups: supercategories, without a box."""
    groups = [c.get("supercategory") for c in categories if c.get("supercategory") != c["name"]]
    out = [c["name"] for c in categories if c["name"] in groups and c["id"] not in used]
    if out:
        print(f"left out, as they name groups of classes and have no box: {', '.join(out)}")
    return [c for c in categories if c["name"] not in out]


def draw(images, annotations, share, rng):
    """Ids of the images for val: a share of all, and of each class's images at least one, but not all."""
    ids = rng.permutation([image["id"] for image in images]).tolist()
    of_class = defaultdict(set)
    train = set()
    val = set()
    for annotation in annotations:
        of_class[annotation["category_id"]].add(annotation["image_id"])
    for members in sorted(of_class.values(), key=len):  # the rarest first; of a single image train has it
        for part in (train, val):
            free = members - train - val
            if free and not part & members:
                part.add(next(i for i in ids if i in free))
    number = min(max(1, round(share * len(ids))), len(ids) - 1)
    rest = [i for i in ids if i not in train and i not in val]
    return val | set(rest[: max(0, number - len(val))]) or {ids[0]}


if __name__ == "__main__":
    usage.run(main)
