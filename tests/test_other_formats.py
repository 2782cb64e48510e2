"""YOLO's labels become COCO's layout by the usage page's command, with boxes and names kept."""

import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from runs import ROOT

from src.dataset import CocoDataset

SIZES = {"a": (200, 100), "b": (64, 48), "c": (120, 90)}
# Objects of each image as (name, left, top, right, bottom) in pixels: c has none.
OBJECTS = {"a": [("dog", 10, 20, 110, 80), ("cat", 0, 0, 50, 50)], "b": [("cat", 16, 12, 48, 36)], "c": []}


def write_yolo(folder):
    """Labels as YOLO has them: class number, center and size relative to the image."""
    folder.mkdir()
    (folder.parents[1] / "names.txt").write_text("cat\ndog\n")
    for name, objects in OBJECTS.items():
        width, height = SIZES[name]
        rows = [
            f"{['cat', 'dog'].index(label)} {(x1 + x2) / 2 / width} {(y1 + y2) / 2 / height}"
            f" {(x2 - x1) / width} {(y2 - y1) / height}\n"
            for label, x1, y1, x2, y2 in objects
        ]
        (folder / f"{name}.txt").write_text("".join(rows))


def readme_command(kind):
    """The words of the usage page's globox command for a format."""
    text = (ROOT / "docs" / "usage.md").read_text().replace(" \\\n", "")  # continued lines as one
    (line,) = (line for line in text.splitlines() if kind in line)
    return shlex.split(line)


def test_yolo_labels_become_cocos_layout(tmp_path):
    images = tmp_path / "my_data" / "train2017"
    images.mkdir(parents=True)
    (tmp_path / "my_data" / "annotations").mkdir()
    for name, size in SIZES.items():
        Image.new("RGB", size).save(images / f"{name}.jpg")
    (tmp_path / "labels").mkdir()
    write_yolo(tmp_path / "labels" / "train")
    globox, *words = readme_command("--format yolov5")
    command = [str(Path(sys.executable).with_name(globox)), *words]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)

    data = CocoDataset(tmp_path / "my_data", "train2017")
    assert data.classes == ["background", "cat", "dog"]
    assert sorted(map(bytes.decode, data.file_names)) == ["a.jpg", "b.jpg", "c.jpg"]
    for index, file_name in enumerate(data.file_names):
        objects = sorted(OBJECTS[file_name.decode()[0]], key=lambda o: data.classes.index(o[0]))
        boxes, found = data.objects(index)
        order = np.argsort(found)
        assert [data.classes[label] for label in found[order]] == [o[0] for o in objects]
        pixels = boxes[order] * np.tile(data.sizes[index], 2)
        expected = np.array([o[1:] for o in objects], float).reshape(-1, 4)
        np.testing.assert_allclose(pixels, expected, atol=1e-3)
