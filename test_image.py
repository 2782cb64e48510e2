"""Detect objects in images.

    python test_image.py --pretrained-model trained_models/ssd.pth --input a.jpg --output b.jpg
    python test_image.py --pretrained-model trained_models/ssd.pth --input folder --output folder2

`--input` takes any number of files and folders.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # which `python -P` leaves out

from src import usage

if __name__ == "__main__":
    usage.quit_on_ctrl_c()  # the imports below take seconds

import json
from collections import Counter
from pathlib import Path

from PIL import Image

from src.detector import Detector, record
from src.images import read_image
from src.usage import UserError
from src.visualize import draw_detections

IMAGE_TYPES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff"}


def parse_args():
    """The command line."""
    parser = usage.ArgumentParser(description=__doc__)
    share = usage.number(float, 0, 1)
    add = parser.add_argument
    add("--input", nargs="+", required=True, help="images, and folders of images, with their sub-folders")
    add(
        "--output",
        help="file for one image, else folder, with the sub-folders of an input folder;"
        " default: {stem}_prediction.jpg beside it",
    )
    add("--json", help="also write the detections to this file")
    add("--pretrained-model", required=True, help="checkpoint from train.py, or a published one")
    add("--cls-threshold", type=share, default=0.3, help="lowest score to show")
    add("--nms-threshold", type=share, default=0.5, help="IoU above which a weaker box is removed")
    add("--amp", action="store_true", help="half precision: float16 on a GPU, bfloat16 on a CPU")
    return parser.parse_args()


def find_images(inputs):
    """Files of all inputs, each with its path within an output folder; those of a folder sorted."""
    files = []
    for path in map(Path, inputs):
        if path.is_dir():
            found = sorted(f for f in path.rglob("*") if f.suffix.lower() in IMAGE_TYPES)
            # A folder that we wrote into before: do not detect in our own drawings.
            found = [f for f in found if not f.stem.endswith("_prediction") and not f.is_dir()]
            files += [(file, file.relative_to(path)) for file in found]
        elif path.is_file():
            files.append((path, Path(path.name)))
        else:
            raise UserError(f"--input {path}: no such file or folder")
    if not files:
        raise UserError(f"--input {' '.join(inputs)}: no images there ({' '.join(sorted(IMAGE_TYPES))})")
    return files


def output_files(inputs, files, output):
    """Where the drawing of each of `files` (from find_images) goes."""
    if output is None:
        outputs = [file.with_name(f"{file.stem}_prediction.jpg") for file, _ in files]
    elif len(files) == 1 and Path(inputs[0]).is_file() and not Path(output).is_dir():
        outputs = [Path(output)]
    else:
        if Path(output).suffix.lower() in IMAGE_TYPES and not Path(output).is_dir():
            raise UserError(f"--output {output}: is an image, --input a folder or several: give a folder")
        outputs = [Path(output) / name.with_name(f"{name.stem}_prediction.jpg") for _, name in files]
    for file in outputs:
        if file.suffix.lower() not in IMAGE_TYPES:
            raise UserError(f"--output {file}: unknown image type; end it in .jpg or .png")
    if len(set(outputs)) < len(outputs):
        raise UserError("--input: two images of the same name would be drawn to one file")
    return outputs


def main():
    """Read, detect, draw, write."""
    args = parse_args()
    files = find_images(args.input)
    outputs = output_files(args.input, files, args.output)
    files = [file for file, _ in files]
    inputs = {(file.stat().st_dev, file.stat().st_ino) for file in files}
    for path in filter(Path.exists, outputs):
        if (path.stat().st_dev, path.stat().st_ino) in inputs:
            raise UserError(f"--output {path}: is an input itself; give another name")
    for path in outputs:
        usage.make_writable("--output", path)
    if args.json:
        usage.make_writable("--json", args.json, files)
    detector = Detector.load(args.pretrained_model, amp=args.amp)
    print(f"{args.pretrained_model}: {detector.layout}")
    records, unreadable = [], []
    for file, output in zip(files, outputs, strict=True):
        try:
            image = read_image(file)
        except UserError as error:
            unreadable.append(str(error))  # the other images first
            continue
        found = detector([image], args.cls_threshold, args.nms_threshold)[0]
        records.append({"file": str(file)} | record(image, found, detector.classes))
        drawn = draw_detections(image, **found, classes=detector.classes)
        Image.fromarray(drawn).save(output, quality=95)
        counts = Counter(detector.classes[label] for label in found["labels"])
        objects = ", ".join(f"{count} {name}" for name, count in counts.items()) or "nothing found"
        print(f"{file}: {objects} -> {output}")
    if args.json:
        Path(args.json).write_text(json.dumps({"images": records}, indent=1))
    if unreadable:
        raise UserError("; ".join(unreadable))


if __name__ == "__main__":
    usage.run(main)
