"""Write the page that detects in a browser to demo/web/dist: static files, which any web server serves.

    make web                  # or: make web CHECKPOINT=trained_models/ssdlite.pth
    python3 -m http.server -d demo/web/dist

Besides the page, what it loads: the detector as ONNX, ONNX Runtime in WebAssembly, three photos, and
detector.json: class names, their colors, and the default boxes.
"""

import base64
import contextlib
import hashlib
import html
import itertools
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from src import usage
from src.boxes import DEFAULT_BOXES, make_default_boxes
from src.usage import UserError
from src.visualize import class_color, takes_black_text

try:
    import onnx
except ModuleNotFoundError:
    sys.exit(usage.complain("onnx is missing: pip install -r requirements-export.txt"))

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CHECKPOINT = ROOT / "demo" / "ssdlite_voc.pth"
PHOTOS = ROOT / "demo" / "photos"
CREDITS = PHOTOS / "CREDITS.md"
PAGE = ("index.html", "style.css", "app.js")
VERSION = "1.30.0"
SHA512 = "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
RUNTIME = HERE / f"onnxruntime-web-{VERSION}"  # downloaded once
RUNTIME_FILES = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")
TITLES = {"ssd": "SSD300-ResNet50", "ssdlite": "SSDLite-MobileNetV2"}


@contextlib.contextmanager
def replacing(folder):
    """Give a new folder, which takes the place of `folder` if all ends well; otherwise nothing changes."""
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}-") as beside:
        new = Path(beside) / "new"
        new.mkdir()
        yield new
        if folder.exists():
            folder.rename(new.with_name("old"))
        new.rename(folder)


def fetch_runtime():
    """Download ONNX Runtime's npm package, once, and keep the two files of it that the page needs."""
    if all((RUNTIME / name).exists() for name in RUNTIME_FILES):
        return
    if not (shutil.which("npm") and shutil.which("node")):
        raise UserError("npm is missing: install Node.js (https://nodejs.org), which comes with it")
    with tempfile.TemporaryDirectory() as folder:
        command = ["npm", "pack", "--loglevel=error", f"onnxruntime-web@{VERSION}"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            reason = re.search(r"npm (?:error|ERR!) (?!code |syscall |errno )(.+)", done.stderr)
            reason = f" ({reason[1]})" if reason else ""
            raise UserError(f"{' '.join(command)} failed: it needs the network; start again{reason}")
        (package,) = Path(folder).iterdir()
        if base64.b64encode(hashlib.sha512(package.read_bytes()).digest()).decode() != SHA512:
            raise UserError(f"{package.name}: not the file that was tested (SHA-512 differs); start again")
        with replacing(RUNTIME) as new, tarfile.open(package) as archive:
            for name in RUNTIME_FILES:
                (new / name).write_bytes(archive.extractfile(f"package/dist/{name}").read())


def export(checkpoint, file):
    """Run export.py; add an output, `matched` int64 (N,): the index of each detection's default box.

    Returns the model's name and its classes.
    """
    command = [sys.executable, ROOT / "export.py", "--pretrained-model", checkpoint, "--output", file]
    if status := subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
        sys.exit(status)
    model = onnx.load(file)
    node = onnx.helper.make_node
    model.graph.node.append(node("GatherND", ["best", "place"], ["kept_default"]))  # names of export.py
    model.graph.node.append(node("Gather", ["kept_default", "order"], ["matched"]))
    model.graph.output.append(onnx.helper.make_tensor_value_info("matched", onnx.TensorProto.INT64, ["N"]))
    # ONNX Runtime in JavaScript takes no input that has a default.
    thresholds = [value for value in model.graph.initializer if value.name.endswith("_threshold")]
    for value in thresholds:
        model.graph.initializer.remove(value)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, file)
    about = {entry.key: entry.value for entry in model.metadata_props}
    return about["model"], json.loads(about["classes"])


def describe(name, classes):
    """detector.json, but for the photos: what the page needs to know besides the network."""
    constants = DEFAULT_BOXES[name]
    feature_maps = list(zip(constants.feature_maps, constants.strides, constants.per_cell, strict=True))
    # The map, shape, row and column of each default box, in their order.
    origins = [
        (number, shape, row, column)
        for number, (cells, _, shapes) in enumerate(feature_maps)
        for shape, row, column in itertools.product(range(shapes), range(cells), range(cells))
    ]
    boxes = [[round(side, 4) for side in box] for box in make_default_boxes(name).tolist()]
    return {
        "title": TITLES[name],
        "classes": classes,
        "colors": [css_colors(label) for label in range(len(classes))],
        "size": constants.input_size,
        "feature_maps": [{"cells": c, "stride": stride, "shapes": shapes} for c, stride, shapes in feature_maps],
        "default_boxes": [[*box, *origin] for box, origin in zip(boxes, origins, strict=True)],
    }


def css_colors(label):
    """The color of a class, and black or white for text on it."""
    color = class_color(label)
    return f"--color: rgb{color}; --ink: {'black' if takes_black_text(color) else 'white'};"


def credited_photos():
    """The first three photos of demo/photos/CREDITS.md, with what the page says of them."""
    row = r"(?m)^\| \[(\S+)\]\(\S+\) \| (.+?) \| (.+?) \| \[(.+?)\]\((\S+?)\) \| (\S+) \|"
    photos = []
    for file, *texts, terms, source in re.findall(row, CREDITS.read_text())[:3]:
        shows, author, kind = map(html.escape, texts)
        credit = f'{shows}. Photo: <a href="{source}">{author}</a>, <a href="{terms}">{kind}</a>'
        photos.append({"file": file, "shows": texts[0], "credit": credit})
    return photos


def main():
    parser = usage.ArgumentParser(description=__doc__)
    parser.add_argument("--pretrained-model", default=CHECKPOINT, help="checkpoint")
    parser.add_argument("--output", default=HERE / "dist", help="folder")
    args = parser.parse_args()
    output = Path(args.output).resolve()
    usage.make_folder("--output", output)
    if any(output.iterdir()) and not (output / "detector.json").exists():
        raise UserError(f"--output {args.output}: holds other files, which would be lost; give a new folder")
    fetch_runtime()
    photos = credited_photos()
    with replacing(output) as new:
        about = describe(*export(args.pretrained_model, new / "detector.onnx")) | {"photos": photos}
        for file in [HERE / name for name in PAGE] + [PHOTOS / photo["file"] for photo in photos]:
            shutil.copy(file, new)
        (new / "onnxruntime").mkdir()
        for name in RUNTIME_FILES:  # not every server knows that .mjs is JavaScript
            shutil.copy(RUNTIME / name, new / "onnxruntime" / name.replace(".mjs", ".js"))
        loaded = [new / "detector.onnx", *(new / "onnxruntime").iterdir()]
        about["megabytes"] = round(sum(file.stat().st_size for file in loaded) / 1e6)
        (new / "detector.json").write_text(json.dumps(about))
    detector = f"{about['title']}, {len(about['classes']) - 1} classes"
    print(f"{args.output}: {detector}, {about['megabytes']} MB; look at it: python3 -m http.server -d {args.output}")


if __name__ == "__main__":
    usage.run(main)
