"""Annotations in the layout of PASCAL VOC's development kit -> COCO layout, `difficult` objects included.

    python -m tools.voc VOCdevkit voc --train 2007:trainval 2012:trainval --val 2007:test

reads VOCdevkit/VOC2007/ImageSets/Main/trainval.txt and so on, with Annotations/ and JPEGImages/ beside
ImageSets/. Of a class's list (aeroplane_train.txt) all images are taken, whatever its second column says.
Classes are those that occur, in alphabetical order; the same ids in both sets.
"""

import json
import math
import os
import shutil
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from src import usage
from src.images import image_size
from src.usage import UserError


def parse_args():
    parser = usage.ArgumentParser(description=__doc__)
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
        objects = f"objects: {len(data['annotations']) - difficult}, difficult objects: {difficult}"
        print(f"{name} -> {out / name}: images: {len(images)}, {objects}, classes: {len(classes)}")


def read_set(devkit, lists):
    """Images of lists such as "2007:trainval", each once: [{file, file_name, size, objects}]."""
    images = {}
    for text in lists:
        year, _, name = text.partition(":")
        folder = devkit / f"VOC{year}"
        file = folder / "ImageSets" / "Main" / f"{name}.txt"
        if not file.is_file():
            raise UserError(f"{text}: there is no {file}; give YEAR:LIST, such as 2007:trainval")
        files = image_files(folder / "JPEGImages")
        for stem in tqdm(read_list(file, files), text, leave=False):
            if len(files[stem]) != 1:
                raise UserError(
                    f"{file}: {len(files[stem])} images {stem}.* in {folder / 'JPEGImages'}: there must be one for each"
                    " line, which has its name without extension"
                )
            images[year, stem] = read_image(files[stem][0], folder)
    return list(images.values())


def image_files(folder):
    """The image files of a folder, by name without extension."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; copy the images there")
    Image.init()
    files = defaultdict(list)
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in Image.EXTENSION and path.is_file():
            files[path.stem].append(path)
    return files


def read_list(file, files):
    """The lines of a list; of one that is not the name of an image, the first word."""
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: is not UTF-8 text: save it as such") from error
    stems = [line if line in files else line.split()[0] for line in lines if line]
    if not stems:
        raise UserError(f"{file}: is empty; each line names an image")
    return stems


def read_image(file, folder):
    """One image and its objects, from Annotations/STEM.xml in `folder`."""
    xml = folder / "Annotations" / f"{file.stem}.xml"
    try:
        root = ElementTree.parse(xml).getroot()
    except FileNotFoundError as error:
        raise UserError(f"{xml}: no such file; every image of a list needs one, if without an <object>") from error
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise UserError(f"{xml}: not an XML file ({error})") from error
    if root.tag != "annotation":
        raise UserError(f"{xml}: its root is <{root.tag}>, in VOC's layout <annotation>: export it as VOC 1.1")
    size = [int(number(root, f"size/{side}", xml, 0)) for side in ("width", "height")]
    size = size if all(size) else image_size(file)  # some tools write 0 x 0
    objects = [read_object(node, f"{xml}: object {n}") for n, node in enumerate(root.findall("object"), start=1)]
    return {"file": file, "file_name": f"{folder.name}/{file.name}", "size": size, "objects": objects}


def read_object(node, source):
    """Name, difficult (0 or 1) and bbox (left, top, width, height) of one <object>."""
    name = (node.findtext("name") or "").strip()
    if not name:
        raise UserError(f"{source} has no <name>: add it")
    # Pixels count from 1, and the last one belongs to the box: from 1 to 1 is one pixel, 0 to 1 in COCO.
    xmin, ymin, xmax, ymax = (number(node, f"bndbox/{key}", source) for key in ("xmin", "ymin", "xmax", "ymax"))
    bbox = [xmin - 1, ymin - 1, xmax - xmin + 1, ymax - ymin + 1]
    return {"name": name, "difficult": int(number(node, "difficult", source, 0) > 0), "bbox": bbox}


def number(node, path, source, default=None):
    """The number in an element below `node`; where there is none, `default`, or UserError without one."""
    text = (node.findtext(path) or "").strip()
    if not text and default is not None:
        return default
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"{source}: its {path} is {text!r}; it must be a number")
    return value


def link_images(images, folder):
    """The images' files in `folder`, by year: hard links where the file system allows them, else copies."""
    for image in images:
        target = folder / image["file_name"]
        usage.make_folder("OUT", target.parent)
        target.unlink(missing_ok=True)
        try:
            os.link(os.path.realpath(image["file"]), target)
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
