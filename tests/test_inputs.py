"""The scripts with inputs as the world has them: odd names, links, addresses, bad files."""

import functools
import http.server
import json
import os
import re
import shutil
import tempfile
import threading
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from runs import ROOT, SHAPES, frames_of, make_video, run_here
from samples import scene
from torchvision.ops import box_iou

from src.detector import Detector
from src.images import read_image


@pytest.fixture
def script(monkeypatch, capfd, blind):
    """Function that runs a script in this process; returns its status, what it says, and its error line."""
    load = Detector.load
    monkeypatch.setattr(Detector, "load", lambda path, *_, **__: blind if path == str(SHAPES) else load(path))

    def run_it(name, *options, model=SHAPES):
        status = run_here(monkeypatch, name, "--pretrained-model", model, *options)
        said = capfd.readouterr()
        assert "Traceback" not in said.err
        errors = [line for line in said.err.splitlines() if line.startswith("error: ")]
        assert len(errors) == (status == 2), said.err
        return status, said.out, "".join(errors)

    return run_it


@pytest.fixture
def unprivileged():
    """A folder of a user who may not do everything, in place of root."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    root = os.geteuid() == 0
    if root:
        os.setresuid(65534, 65534, 0)
    yield folder
    if root:
        os.setresuid(0, 0, 0)
    shutil.rmtree(folder, onerror=lambda *_: None)


def photo(path):
    """A small image at `path`, and `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(scene(40, 50)).save(path)
    return path


# Outputs apart from one another, and from inputs


@pytest.mark.parametrize(
    "name, options, named",
    [
        ("test_image.py", ["--output", "b.png", "--json", "b.png"], "--json b.png: is what --output writes, too"),
        ("test_image.py", ["--output", "b.png", "--json", "./link/b.png"], "what --output writes"),
        ("test_image.py", ["--json", "a_prediction.jpg"], "what --output writes"),
        ("test_image.py", ["--json", "model.pth"], "an input"),
        ("test_image.py", ["--output", "a.jpg"], "an input"),
        ("test_image.py", ["--json", "link/a.jpg"], "an input"),
        ("test_image.py", ["--json", "hard.jpg"], "an input"),
        ("test_image.py", ["--json", "new/"], "is a folder"),
        ("test_video.py", ["--output", "b.mp4", "--json", "b.mp4"], "what --output writes"),
        ("test_video.py", ["--json", "clip_prediction.mp4"], "what --output writes"),
        ("test_video.py", ["--output", "link/clip.avi"], "an input"),
        ("test_video.py", ["--json", "model.pth"], "an input"),
    ],
)
def test_outputs_are_neither_one_another_nor_inputs(script, tmp_path, monkeypatch, name, options, named):
    monkeypatch.chdir(tmp_path)
    shutil.copy(SHAPES, "model.pth")
    make_video("clip.avi", 1)
    photo(Path("a.jpg"))
    os.symlink(".", "link")
    os.link("a.jpg", "hard.jpg")
    before = {file: Path(file).read_bytes() for file in ("model.pth", "clip.avi", "a.jpg")}
    source = {"test_image.py": "a.jpg", "test_video.py": "clip.avi"}[name]
    status, _, error = script(name, "--input", source, *options, model="model.pth")
    assert status == 2 and named in error and options[-1] in error
    assert all(Path(file).read_bytes() == data for file, data in before.items())
    assert sorted(os.listdir()) == ["a.jpg", "clip.avi", "hard.jpg", "link", "model.pth"]


def test_drawings_do_not_replace_the_images_they_are_of(script, shapes_folder, tmp_path):
    data = shutil.copytree(shapes_folder, tmp_path / "data")
    file = data / "annotations" / "instances_val2017.json"
    content = json.loads(file.read_text())
    image = content["images"][0]  # out/ID.jpg will be its drawing
    (tmp_path / "out").mkdir()
    os.link(data / "val2017" / image["file_name"], tmp_path / "out" / f"{image['id']}.jpg")
    options = ["--data-path", data, "--num-workers", 0, "--output", tmp_path / "out"]
    status, _, error = script("test_dataset.py", *options)
    assert status == 2 and f"{image['id']}.jpg: is an input" in error


def test_two_images_for_one_drawing_are_named(script, tmp_path):
    for name in ("a.jpg", "a.png", "b.png"):
        photo(tmp_path / name)
    status, _, error = script("test_image.py", "--input", tmp_path)
    assert status == 2 and f"{tmp_path}/a.jpg {tmp_path}/a.png" in error and "b.png" not in error


def test_an_image_given_twice_is_processed_once(script, tmp_path):
    file = photo(tmp_path / "in/sub/a.jpg")
    photo(tmp_path / "in/b.jpg")
    other = photo(tmp_path / "other/c.jpg")
    photo(tmp_path / "c.jpg")
    photo(tmp_path / "in/c.jpg")
    (tmp_path / "in/link").symlink_to(other.parent)
    inputs = [file, tmp_path / "in", tmp_path / "in", tmp_path / "in/../in/b.jpg"]
    inputs.append(tmp_path / "in/link/../c.jpg")  # not in/c.jpg
    status, said, _ = script("test_image.py", "--input", *inputs)
    assert status == 0 and said.count(" -> ") == 4 and "skipped: 1 links to folders\n" in said
    drawn = {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*_prediction.jpg")}
    assert drawn == {"in/sub/a_prediction.jpg", "in/b_prediction.jpg", "in/c_prediction.jpg", "c_prediction.jpg"}


@pytest.mark.parametrize("output", ["drawn/", "new/drawn/"])
def test_a_slash_at_its_end_makes_an_output_a_folder(script, tmp_path, monkeypatch, output):
    monkeypatch.chdir(tmp_path)
    status, *_ = script("test_image.py", "--input", photo(Path("a.jpg")), "--output", output)
    assert status == 0 and Path(output, "a_prediction.jpg").is_file()


def test_tiles_find_what_is_small_in_a_large_image(script, tmp_path):
    """An image of shapes in the midst of a large one: with tiles what is found in it alone, without them nothing."""
    small = read_image(ROOT / "demo" / "pictures" / "1.jpg")
    large = np.full((1200, 1600, 3), 128, np.uint8)
    height, width = small.shape[:2]
    large[500 : 500 + height, 700 : 700 + width] = small
    Image.fromarray(large).save(tmp_path / "large.png")
    model = shutil.copy(SHAPES, tmp_path / "a.pth")
    found = []
    for options in ([], ["--tile", 360]):
        options = ["--input", tmp_path / "large.png", "--json", tmp_path / "a.json", "--cls-threshold", 0.5, *options]
        assert script("test_image.py", *options, model=model)[0] == 0
        found.append(json.loads((tmp_path / "a.json").read_text())["images"][0]["detections"])
    detector = Detector.load(model)
    (alone,) = detector([small], 0.5)
    expected = alone["boxes"] + torch.tensor([700, 500, 700, 500])
    whole, tiles = ([one["box"] for one in detections] for detections in found)
    overlap = box_iou(expected, torch.tensor(tiles))
    assert whole == [] and (overlap.amax(dim=1) > 0.7).sum() >= 4
    status, _, error = script("test_image.py", "--input", tmp_path / "large.png", "--tile", 0)
    assert status == 2 and "--tile" in error and "at least" in error


# Folders


def test_a_folder_is_searched_and_what_is_skipped_counted(script, tmp_path):
    folder, elsewhere = tmp_path / "in", tmp_path / "elsewhere"
    taken = ["a.jfif", "b.avif", "c.ppm", "d.jp2", "e.JPE", "sub/f.dib", ".hidden.png"]
    for name in taken:
        photo(folder / name) if name != "e.JPE" else shutil.copy(photo(tmp_path / "e.jpg"), folder / name)
    photo(elsewhere / "z.jpg")
    for name in ("._a.jpg", "note.txt", "x.heic", "y.heic", "Makefile"):
        (folder / name).write_text("no image")
    photo(folder / "best_prediction.jpg")
    (folder / "link").symlink_to(elsewhere)
    (folder / "loop").symlink_to(folder)
    os.mkfifo(folder / "pipe.jpg")
    found = tmp_path / "found.json"
    status, said, _ = script("test_image.py", "--input", folder, "--output", tmp_path / "out", "--json", found)
    assert status == 0
    files = [str(Path(one["file"]).relative_to(folder)) for one in json.loads(found.read_text())["images"]]
    assert sorted(files) == sorted(taken)
    (line,) = (line for line in said.splitlines() if line.startswith("skipped: "))
    for count in (
        "2 links to folders",
        "2 of type .heic",
        "1 of type .txt",
        "1 of type unknown",
        "1 named *_prediction",
    ):
        assert count in line
    assert "1 companions of macOS" in line and "1 pipes" in line


def test_a_folder_that_may_not_be_read_is_counted(script, unprivileged):
    photo(unprivileged / "a.png")
    photo(unprivileged / "closed" / "b.png").parent.chmod(0)
    status, said, _ = script("test_image.py", "--input", unprivileged, "--output", unprivileged / "out")
    assert status == 0 and "skipped: 1 folders that cannot be read (Permission denied)" in said


def test_a_folder_without_images_says_what_it_holds(script, tmp_path):
    (tmp_path / "a.heic").write_text("")
    status, _, error = script("test_image.py", "--input", tmp_path)
    assert status == 2 and "1 of type .heic" in error


# One bad file among good ones


def test_bad_images_do_not_take_the_others_along(script, unprivileged):
    folder = unprivileged / "in"
    for name in ("a.png", "z.png", "closed.png", "x" * 250 + ".png", "caf\udce9.png", "caf\u00e9.png"):
        photo(folder / name)
    (folder / "closed.png").chmod(0)
    for link in (folder / "dangling.png", unprivileged / "dangling too.png"):
        link.symlink_to("nothing")
    Image.new("RGB", (70_000, 2)).save(folder / "wide.png")  # more than a JPEG can have
    (folder / "pointer.png").write_text("version https://git-lfs.github.com/spec/v1\n")
    found = unprivileged / "found.json"
    status, said, error = script(
        "test_image.py", "--input", folder, link, "--output", unprivileged / "out", "--json", found
    )
    assert status == 2
    for part in (
        "dangling.png",
        "dangling too.png",
        "closed.png",
        "wide_prediction.jpg",
        "70000x2",
        "xxx_prediction.jpg",
        "git lfs pull",
    ):
        assert part in error
    drawn = {file.name for file in (unprivileged / "out").iterdir()}
    assert drawn == {f"{name}_prediction.jpg" for name in ("a", "z", "caf\udce9", "caf\u00e9")}
    names = {Path(one["file"]).name for one in json.loads(found.read_text())["images"]}
    assert {"a.png", "z.png", "wide.png", "caf\udce9.png"} <= names  # drawn or not


def test_a_drawing_that_cannot_be_written_does_not_take_the_metrics_along(script, shapes_folder, tmp_path):
    data = shutil.copytree(shapes_folder, tmp_path / "data")
    file = data / "annotations" / "instances_val2017.json"
    content = json.loads(file.read_text())
    image = content["images"][1]
    image |= {"width": 70_000, "height": 2, "file_name": "wide.png"}
    Image.new("RGB", (70_000, 2)).save(data / "val2017" / "wide.png")
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != image["id"]]
    content["annotations"].append(content["annotations"][0] | {"id": 999})
    file.write_text(json.dumps(content))
    options = ["--data-path", data, "--num-workers", 0, "--output", tmp_path / "out"]
    status, said, error = script("test_dataset.py", *options)
    assert status == 2 and f"{image['id']}.jpg" in error and "70000x2" in error
    assert "AP50" in said and "1 boxes are the same as another" in said
    assert len(list((tmp_path / "out").glob("*.jpg"))) == 5


# Videos


def test_names_that_ffmpeg_takes_for_addresses_and_names_in_utf8(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a:1.avi", "caf\u00e9.avi", "100%.avi", "a_%03d.avi"):
        make_video("plain.avi", 2)
        os.rename("plain.avi", name)
        status, said, _ = script("test_video.py", "--input", name)
        assert status == 0 and len(frames_of(f"{tmp_path}/{Path(name).stem}_prediction.mp4")) == 2
        assert "without sound" in said


@pytest.mark.parametrize(
    "source, output", [("caf\udce9.avi", "b.mp4"), ("a.avi", "caf\udce9.mp4"), ("rtsp://\udce9", "b.mp4")]
)
def test_names_that_opencv_cannot_take_are_a_users_error(script, tmp_path, monkeypatch, source, output):
    monkeypatch.chdir(tmp_path)
    make_video("a.avi", 1)
    shutil.copy("a.avi", "caf\udce9.avi")
    status, _, error = script("test_video.py", "--input", source, "--output", output)
    assert status == 2 and "UTF-8" in error and "rename" in error


@pytest.mark.parametrize("pattern, stem", [("img_%03d.jpg", "img"), ("%d.jpg", "images")])
def test_images_by_number_are_a_video(script, tmp_path, pattern, stem):
    for number in range(1, 6):
        cv2.imwrite(str(tmp_path / (pattern % number)), np.full((48, 64, 3), 40 * number, np.uint8))
    status, said, _ = script("test_video.py", "--input", tmp_path / pattern)
    frames = frames_of(tmp_path / f"{stem}_prediction.mp4")
    assert status == 0 and len(frames) == 5 and "truncated" not in said
    assert [round(frame.mean() / 40) for frame in frames] == [1, 2, 3, 4, 5]
    status, _, error = script("test_video.py", "--input", tmp_path / "other_%03d.jpg")
    assert status == 2 and "other_%03d.jpg" in error


def test_an_address_is_a_video(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "served").mkdir()
    make_video("served/clip.avi", 3)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory="served")
    handler.log_message = lambda *_: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        assert script("test_video.py", "--input", f"{address}/clip.avi")[0] == 0
        status, _, error = script("test_video.py", "--input", f"{address}/no.avi")
        assert status == 2 and f"{address}/no.avi" in error
        server.shutdown()
    assert len(frames_of("clip_prediction.mp4")) == 3
    assert sorted(os.listdir()) == ["clip_prediction.mp4", "served"]


@pytest.mark.parametrize("width, height", [(321, 241), (320, 241), (1, 1)])
def test_odd_sides_lose_no_pixel_and_it_is_said(script, tmp_path, width, height):
    frame = Image.new("RGB", (width, height), "red")
    frame.save(tmp_path / "a.gif", save_all=True, append_images=[Image.new("RGB", (width, height), "blue")])
    status, said, _ = script("test_video.py", "--input", tmp_path / "a.gif", "--json", tmp_path / "a.json")
    assert status == 0
    even = width + width % 2, height + height % 2
    assert frames_of(tmp_path / "a_prediction.mp4")[0].shape[1::-1] == even
    assert f"{even[0]}x{even[1]} as sides must be even" in said and re.search(r"; \d+\.\d frames per second", said)
    line = json.loads((tmp_path / "a.json").read_text().splitlines()[0])
    assert (line["width"], line["height"]) == (width, height)


def test_pixels_that_are_not_square_are_told_of(script, tmp_path):
    make_video(tmp_path / "a.mpg", 4, "mpg2", rate=25)
    assert "square" not in script("test_video.py", "--input", tmp_path / "a.mpg", "--cls-threshold", 1)[1]
    data = (tmp_path / "a.mpg").read_bytes()
    start = data.index(b"\0\0\1\xb3") + 7  # MPEG-2's sequence header; 3 in its upper half: shown at 16:9
    (tmp_path / "b.mpg").write_bytes(data[:start] + bytes([0x30 | data[start] & 15]) + data[start + 1 :])
    said = script("test_video.py", "--input", tmp_path / "b.mpg", "--cls-threshold", 1)[1]
    assert "square pixels (the input's are 4:3)" in said  # 320x240 shown at 16:9


def test_a_video_that_may_not_be_read_is_named(script, unprivileged):
    (unprivileged / "a.avi").write_bytes(b"")
    (unprivileged / "a.avi").chmod(0)
    status, _, error = script("test_video.py", "--input", unprivileged / "a.avi")
    assert status == 2 and "a.avi: may not be read" in error


# Names of any length, files without permission


@pytest.mark.parametrize(
    "name, options",
    [
        ("test_image.py", ["--input", "{long}.jpg"]),
        ("test_image.py", ["--input", "{folder}/a.png", "--output", "{folder}/{long}.jpg"]),
        ("test_image.py", ["--input", "{folder}/a.png", "--output", "{folder}/{long}/"]),
        ("test_image.py", ["--input", "{folder}/a.png", "--json", "{folder}/{long}"]),
        ("test_image.py", ["--input", "{folder}/a.png", "--pretrained-model", "{long}"]),
        ("test_image.py", ["--input", "{folder}/a.png", "--pretrained-model", "{closed}"]),
        ("test_image.py", ["--input", "{folder}/a.png", "--json", "{folder}/closed_folder/a.json"]),
        ("test_image.py", ["--input", "{folder}/closed_folder/a.png"]),
        ("test_video.py", ["--input", "{long}.mp4"]),
        ("test_dataset.py", ["--data-path", "{long}"]),
        ("test_dataset.py", ["--data-path", "{folder}/closed_folder"]),
        ("test_dataset.py", ["--data-path", "{folder}", "--val-set", "closed"]),
        ("test_dataset.py", ["--data-path", "{folder}", "--val-set", "{long}"]),
    ],
)
def test_names_too_long_and_files_that_may_not_be_read(script, unprivileged, name, options):
    photo(unprivileged / "a.png")
    closed = unprivileged / "annotations" / "instances_closed.json"
    closed.parent.mkdir()
    (unprivileged / "closed_folder" / "annotations").mkdir(parents=True)
    closed.write_text("{}")
    closed.chmod(0)
    (unprivileged / "closed_folder").chmod(0)
    places = {"long": "x" * 300, "folder": unprivileged, "closed": closed}
    options = [option.format(**places) for option in options]
    status, _, error = script(name, *options)
    assert status == 2 and Path(options[-1]).name[:20] in error
    assert "broken" not in error


# Training sets and folders


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda annotations: [], "12 images, 0 boxes"),
        (lambda annotations: [a | {"iscrowd": 1} for a in annotations], "crowd regions not trained on"),
        (lambda annotations: [a | {"bbox": [1, 1, 0, 5]} for a in annotations], "boxes of no area left out"),
    ],
)
def test_a_training_set_without_a_box_to_learn_from_is_an_error(
    monkeypatch, capfd, shapes_folder, tmp_path, change, message
):
    data = shutil.copytree(shapes_folder, tmp_path / "data")
    file = data / "annotations" / "instances_train2017.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"annotations": change(content["annotations"])}))
    options = ["--data-path", data, "--save-folder", tmp_path / "new", "--batch-size", 4, "--epochs", 1]
    options += ["--log-path", tmp_path / "new", "--no-pretrained-backbone", "--num-workers", 0, "--model", "ssdlite"]
    assert run_here(monkeypatch, "train.py", *options) == 2
    error = capfd.readouterr().err
    assert f"error: {file}: " in error and message in error and "no box to learn from" in error
    assert not (tmp_path / "new").exists()


def test_a_log_path_that_tensorboard_cannot_take_is_an_error(script, shapes_folder, tmp_path):
    options = [
        "--data-path",
        shapes_folder,
        "--save-folder",
        tmp_path / "new\udce9",
        "--log-path",
        tmp_path / "log\udce9",
    ]
    status, _, error = script("train.py", *options, "--batch-size", 4)
    assert status == 2 and "--log-path" in error and "UTF-8" in error


def test_a_run_does_not_overwrite_the_checkpoint_that_it_starts_from(script, shapes_folder, tmp_path):
    best = shutil.copy(SHAPES, tmp_path / "ssdlite_best.pth")
    options = ["--data-path", shapes_folder, "--save-folder", tmp_path, "--log-path", tmp_path, "--batch-size", 4]
    options += ["--epochs", 1, "--num-workers", 0, "--model", "ssdlite"]
    status, _, error = script("train.py", *options, model=best)
    assert status == 2 and f"--save-folder {best}: is an input" in error
