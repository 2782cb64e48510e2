"""Annotations in the layout of PASCAL VOC's development kit -> COCO layout, `difficult` objects included.

    python -m tools.voc VOCdevkit voc --train 2007:trainval 2012:trainval --val 2007:test

reads VOCdevkit/VOC2007/ImageSets/Main/trainval.txt and so on, with Annotations/ and JPEGImages/ beside
ImageSets/. Classes are those that occur, in alphabetical order; the same ids in both sets.
"""

import json
import os
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from tqdm import tqdm

from src import usage
from src.images import image_size
from src.usage import UserError

CORNERS = ("xmin", "ymin", "xmax", "ymax")


def parse_args():
    """The command line."""
    parser = usage.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("devkit", metavar="VOCDEVKIT", help="folder that holds VOC2007 and so on")
    add("out", metavar="OUT", help="folder for annotations/, train/ and val/")
    for name in ("train", "val"):
        lists = f"what {name} is made of; 2007:trainval is VOC2007/ImageSets/Main/trainval.txt"
        add(f"--{name}", nargs="+", metavar="YEAR:LIST", required=True, help=lists)
    return parser.parse_args()


def main():
    """Read all images of both sets, number their classes, write both sets."""
    args = parse_args()
    out = Path(args.out)
    sets = {name: read_set(Path(args.devkit), getattr(args, name)) for name in ("train", "val")}
    classes = sorted({o["name"] for images in sets.values() for image in images for o in image["objects"]})
    if not classes:
        raise UserError(f"{args.devkit}: no object in any image of its lists: there is nothing to detect")
    usage.make_folder("OUT", out / "annotations")
    for name, images in sets.items():
        link_images(images, out / name)
        data = coco_layout(images, classes)
        (out / "annotations" / f"instances_{name}.json").write_text(json.dumps(data))
        difficult = sum(a["difficult"] for a in data["annotations"])
        print(
            f"{name}: {len(images)} images, {len(data['annotations']) - difficult} objects and {difficult} difficult"
            f" ones of {len(classes)} classes -> {out / name}"
        )


def read_set(devkit, lists):
    """Images of lists such as "2007:trainval", each once: [{file, file_name, size, objects}]."""
    images = {}
    for text in lists:
        year, _, name = text.partition(":")
        folder = devkit / f"VOC{year}"
        file = folder / "ImageSets" / "Main" / f"{name}.txt"
        if not file.is_file():
            raise UserError(f"{text}: there is no {file}; give YEAR:LIST, such as 2007:trainval")
        if not (folder / "JPEGImages").is_dir():
            raise UserError(f"{folder / 'JPEGImages'}: no such folder; copy the images there")
        files = {path.stem: path for path in (folder / "JPEGImages").iterdir()}
        stems = [line.split()[0] for line in file.read_text().splitlines() if line.strip()]
        if not stems:
            raise UserError(f"{text}: its file {file} is empty; each line names an image")
        for stem in tqdm(stems, text, leave=False):
            if stem not in files:
                raise UserError(f"{file}: its image {stem!r} is not in {folder / 'JPEGImages'}: copy it there")
            images[year, stem] = read_image(files[stem], folder)
    return list(images.values())


def read_image(file, folder):
    """One image and its objects, from Annotations/STEM.xml in `folder`."""
    xml = folder / "Annotations" / f"{file.stem}.xml"
    try:
        root = ElementTree.parse(xml).getroot()
        size = [int(root.findtext(f"size/{side}") or 0) for side in ("width", "height")]
        objects = [read_object(node, f"{xml}: object {n}") for n, node in enumerate(root.findall("object"), start=1)]
    except FileNotFoundError as error:
        raise UserError(f"{xml}: no such file; every image of a list needs one, if without an <object>") from error
    except (ElementTree.ParseError, ValueError) as error:
        raise UserError(f"{xml}: not an annotation of VOC's kind ({error})") from error
    # Some tools write 0 x 0.
    size = size if all(size) else image_size(file)
    return {"file": file, "file_name": f"{folder.name}/{file.name}", "size": size, "objects": objects}


def read_object(node, source):
    """Name, difficult (0 or 1) and bbox (left, top, width, height) of one <object>."""
    name, corners = (node.findtext("name") or "").strip(), [node.findtext(f"bndbox/{key}") for key in CORNERS]
    if not name or None in corners:
        raise UserError(f"{source} has no {'<bndbox> of four corners' if name else '<name>'}: add it")
    # Pixels count from 1, and the last one belongs to the box: from 1 to 1 is one pixel, 0 to 1 in COCO.
    xmin, ymin, xmax, ymax = map(float, corners)
    bbox = [xmin - 1, ymin - 1, xmax - xmin + 1, ymax - ymin + 1]
    return {"name": name, "difficult": int(bool(int(node.findtext("difficult") or 0))), "bbox": bbox}


def link_images(images, folder):
    """The images' files in `folder`, by year: hard links where the file system allows them, else copies."""
    for image in images:
        target = folder / image["file_name"]
        usage.make_writable("OUT", target)
        target.unlink(missing_ok=True)
        try:
            os.link(image["file"], target)
        except OSError:  # another file system
            shutil.copyfile(image["file"], target)


def coco_layout(images, classes):
    """The content of a COCO annotation file; images are numbered from 1, classes in their order."""
    data = {"images": [], "annotations": [], "categories": []}
    for number, name in enumerate(classes, start=1):
        data["categories"].append({"id": number, "name": name})
    for number, image in enumerate(images, start=1):
        width, height = image["size"]
        data["images"].append({"id": number, "file_name": image["file_name"], "width": width, "height": height})
        for o in image["objects"]:
            data["annotations"].append(
                {
                    "id": len(data["annotations"]) + 1,
                    "image_id": number,
                    "category_id": classes.index(o["name"]) + 1,
                    "bbox": o["bbox"],
                    "area": o["bbox"][2] * o["bbox"][3],
                    # COCO's evaluation ignores crowds, and this is its only way to ignore an object.
                    "iscrowd": o["difficult"],
                    "difficult": o["difficult"],
                }
            )
    return data


if __name__ == "__main__":
    usage.run(main)
