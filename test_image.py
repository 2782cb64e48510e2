"""Detect objects in images.

    python test_image.py --pretrained-model trained_models/ssd.pth --input a.jpg --output b.jpg
    python test_image.py --pretrained-model trained_models/ssd.pth --input folder --output folder2

`--input` takes any number of files and folders.
"""

import json
import os
from collections import Counter
from pathlib import Path

from src import usage
from src.detector import SHOW_THRESHOLD, Detector, add_options, detect_in_tiles, json_entry
from src.images import read_image, save_image
from src.usage import UserError
from src.visualize import draw_detections

# The rasters that Pillow reads and writes.
IMAGE_TYPES = set(
    ".jpg .jpeg .jpe .jfif .png .apng .bmp .dib .gif .webp .tif .tiff .avif .ppm .pgm .pbm .pnm"
    " .jp2 .j2k .jpx .jpf .tga .qoi".split()
)


def parse_args():
    parser = usage.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--input", nargs="+", required=True, help="images, and folders of images, with their sub-folders")
    add(
        "--output",
        help="file for one image, else folder, with the sub-folders of an input folder;"
        " default: {stem}_prediction.jpg beside it",
    )
    add("--json", help="also write the detections to this file")
    tile = "also detect in overlapping tiles, so many pixels wide and high: for small objects in large images"
    add("--tile", type=usage.number(int, 32), metavar="PIXELS", help=tile)
    add_options(parser, SHOW_THRESHOLD)
    return parser.parse_args()


def find_images(inputs):
    """Files of all inputs, each once, with its path within an output folder; and what was skipped, in words."""
    files = {}  # by folder and name
    skipped = Counter()
    for path in dict.fromkeys(map(Path, inputs)):
        if os.path.isdir(path):
            for file in sorted(search(path, skipped)):
                files.setdefault(path_key(file), (file, file.relative_to(path)))
        elif os.path.isfile(path) or os.path.islink(path):  # a broken link is reported with the other failures
            files.setdefault(path_key(path), (path, Path(path.name)))
        else:
            raise UserError(f"--input {path}: no such file or folder")
    skipped = ", ".join(f"{count} {what}" for what, count in skipped.items() if count)
    if not files:
        raise UserError(f"--input {' '.join(inputs)}: no images there, but {skipped or 'nothing'}; give files by name")
    return list(files.values()), skipped


def path_key(file):
    """A key that is the same for all ways to write the path of a file, but not for links to it."""
    return os.path.realpath(file.parent), file.name


def search(folder, skipped):
    """Yield the image files in a folder and its sub-folders; count in `skipped` what else is there."""

    def unread(error):
        skipped[f"folders that cannot be read ({error.strerror})"] += 1

    for root, folders, names in os.walk(folder, onerror=unread):
        skipped["links to folders"] += sum(os.path.islink(os.path.join(root, name)) for name in folders)
        for name in names:
            file = Path(root, name)
            if name.startswith("._"):  # what macOS adds to a file on other file systems
                skipped["companions of macOS (._*)"] += 1
            elif file.suffix.lower() not in IMAGE_TYPES:
                skipped[f"of type {file.suffix.lower() or 'unknown'}"] += 1
            elif file.stem.endswith("_prediction"):  # we may have written into this folder before
                skipped["named *_prediction"] += 1
            elif os.path.exists(file) and not os.path.isfile(file):
                skipped["pipes or devices"] += 1
            else:
                yield file


def output_files(inputs, files, output):
    """Where the drawing of each of `files` (from find_images) goes."""
    if output is None:
        outputs = [file.with_name(f"{file.stem}_prediction.jpg") for file, _ in files]
    elif len(files) == 1 and not os.path.isdir(inputs[0]) and not is_folder(output):
        outputs = [Path(output)]
    else:
        if Path(output).suffix.lower() in IMAGE_TYPES and not is_folder(output):
            raise UserError(f"--output {output}: is an image, --input a folder or several: give a folder")
        outputs = [Path(output) / name.with_name(f"{name.stem}_prediction.jpg") for _, name in files]
    for file in outputs:
        if file.suffix.lower() not in IMAGE_TYPES:
            raise UserError(f"--output {file}: unknown image type; end it in .jpg or .png, a folder in /")
    sources = {}
    for (file, _), output in zip(files, outputs, strict=True):
        other = sources.setdefault(output, file)
        if other is not file:
            raise UserError(f"--input {other} {file}: would both be drawn to {output}; rename one")
    return outputs


def is_folder(path):
    """True for a folder, and for what is meant as one: a name with a slash at its end, or without a dot."""
    return os.path.isdir(path) or path.endswith(("/", os.sep)) or not Path(path).suffix


def main():
    args = parse_args()
    files, skipped = find_images(args.input)
    outputs = output_files(args.input, files, args.output)
    files = [file for file, _ in files]
    written = [("--output", path) for path in outputs]
    if args.json:
        written.append(("--json", args.json))
    usage.prepare_outputs(written, [*files, args.pretrained_model])
    detector = Detector.load(args.pretrained_model, args.device, args.amp)
    print(f"{args.pretrained_model}: {detector.origin}")
    if skipped:
        print(f"skipped: {skipped}")
    records = []
    failed = []
    for file, output in zip(files, outputs, strict=True):
        try:
            image = read_image(file)
            if args.tile:
                found = detect_in_tiles(detector, image, args.tile, args.cls_threshold, args.nms_threshold)
            else:
                found = detector([image], args.cls_threshold, args.nms_threshold)[0]
            records.append({"file": str(file)} | json_entry(image, found, detector.classes))
            save_image(draw_detections(image, **found, classes=detector.classes), output, quality=95)
        except UserError as error:
            failed.append(str(error))  # the other images first
            continue
        counts = Counter(detector.classes[label] for label in found["labels"])
        objects = ", ".join(f"{count} {name}" for name, count in counts.items()) or "nothing found"
        print(f"{file}: {objects} -> {output}")
    if args.json:
        Path(args.json).write_text(json.dumps({"images": records}, indent=1))
    if failed:
        raise UserError("; ".join(failed))


if __name__ == "__main__":
    usage.run(main)
