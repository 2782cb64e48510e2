"""The command lines, run as a user runs them: train, resume, evaluate, detect."""

import fcntl
import json
import math
import multiprocessing
import os
import pty
import re
import runpy
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from runs import ENV, ROOT, SHAPES, assert_same_end, frames_of, make_video, run, run_here, scalars
from samples import mb2_ssd_lite
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from demo.shapes import make_dataset
from src import stopping
from src.checkpoint import COCO_CATEGORY_IDS, COCO_CLASSES, VOC_CLASSES
from src.dataset import CocoDataset, TrainSampler
from src.detector import Detector
from src.engine import METRICS
from src.images import read_image
from src.model import build_model
from src.visualize import class_color

SMALL = ["--no-pretrained-backbone", "--batch-size", "4", "--num-workers", "0"]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "shapes"
    make_dataset(folder, train=12, val=5, seed=1)
    return folder


def training(shapes, folder, *options):
    """A command that trains SSDLite."""
    places = ["--data-path", shapes, "--save-folder", folder, "--log-path", folder / "log"]
    return ["train.py", *places, "--model", "ssdlite", *SMALL, *options]


def start(shapes, folder, *options, **settings):
    """Start training in a process, in a session of its own."""
    command = [sys.executable, *map(str, training(shapes, folder, *options))]
    return subprocess.Popen(command, cwd=ROOT, env=ENV, start_new_session=True, **settings)


def wait_for_checkpoint(folder, process, newer_than=-1):
    """Wait until a training process has saved a checkpoint, of a later time in ns."""
    file = folder / "ssdlite.pth"
    while not file.exists() or file.stat().st_mtime_ns <= newer_than:
        assert process.poll() is None
        time.sleep(0.05)


def load(path):
    return torch.load(path, weights_only=True)


@pytest.fixture(scope="module")
def trained(shapes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    run(*training(shapes, folder, "--epochs", 2))
    return folder


def test_training_leaves_checkpoints_and_a_log(trained):
    state = load(trained / "ssdlite.pth")
    assert state["model"] == "ssdlite" and state["epoch"] == 2 and state["samples_seen"] == 0
    assert state["classes"][0] == "background" and len(state["classes"]) == 7
    assert state["category_ids"] == sorted(state["category_ids"])
    assert (trained / "ssdlite_best.pth").is_file()
    found = scalars(trained / "log" / "ssdlite")
    train_tags = {"Loss", "Loss_loc", "Loss_cls", "LR", "Images_per_second"}
    test_tags = {"mAP", *METRICS[1:]}
    assert set(found) == {f"Train/{t}" for t in train_tags} | {f"Test/{t}" for t in test_tags}
    assert [event.step for event in found["Test/mAP"]] == [3, 6]
    assert all(math.isfinite(event.value) for events in found.values() for event in events)
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [(line["model"], line["epoch"]) for line in lines] == [("ssdlite", 1), ("ssdlite", 2)]
    assert [line["AP"] for line in lines] == pytest.approx([event.value for event in found["Test/mAP"]])


def test_the_log_shows_images_with_predictions_beside_the_ground_truth(shapes, trained):
    log = EventAccumulator(str(trained / "log" / "ssdlite"), size_guidance={"images": 0})
    log.Reload()
    assert log.Tags()["images"] == [f"Test/Image_{n}" for n in range(4)]
    data = CocoDataset(shapes, "val2017")
    boxes = 0
    for n in range(4):
        first, second = log.Images(f"Test/Image_{n}")
        assert (first.step, second.step) == (3, 6)
        image = cv2.imdecode(np.frombuffer(first.encoded_image_string, np.uint8), cv2.IMREAD_COLOR)
        assert image.shape == (300, 600, 3)
        ground_truth = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)[:, 300:]
        for box, label in zip(*data.objects(n), strict=True):
            _, top, right, bottom = (300 * box).round().astype(int)
            edge = ground_truth[top : bottom + 1, min(right, 299)].astype(int)
            near = abs(edge - class_color(label)).max(axis=1) < 2  # but where a label covers it
            assert near.mean() > 0.5
            boxes += 1
    assert boxes > 3


def test_killed_then_told_to_stop_a_run_ends_as_if_nothing_had_been(shapes, trained, tmp_path, monkeypatch):
    options = ["--epochs", 2, "--save-every", 1]
    process = start(shapes, tmp_path, *options, "--num-workers", 2)
    try:
        wait_for_checkpoint(tmp_path, process)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    process = start(shapes, tmp_path, *options, "--num-workers", 1, stdout=subprocess.PIPE, text=True)
    try:
        wait_for_checkpoint(tmp_path, process, (tmp_path / "ssdlite.pth").stat().st_mtime_ns)
        process.terminate()
        said = process.communicate(timeout=120)[0]
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM and "the same command resumes" in said
    assert re.search(r"resuming from .*: (?:1|0 epochs, [1-9])", said)
    stopped = load(tmp_path / "ssdlite.pth")
    assert (0, 4) < (stopped["epoch"], stopped["samples_seen"]) < (2, 0)
    assert run_here(monkeypatch, *training(shapes, tmp_path, *options)) == 0
    assert_same_end(tmp_path, trained)


def test_a_run_whose_terminal_closes_saves_and_ends(shapes, tmp_path):
    master, slave = pty.openpty()
    settings = {"stdin": slave, "stdout": slave, "stderr": slave}
    own_terminal = lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # noqa: E731
    process = start(shapes, tmp_path, "--epochs", 1000, "--save-every", 1, preexec_fn=own_terminal, **settings)
    try:
        os.close(slave)
        while not (tmp_path / "ssdlite.pth").exists():
            assert process.poll() is None
            select.select([master], [], [], 0.05)[0] and os.read(master, 10**5)
        os.close(master)  # SIGHUP for the process; from now on its every write fails
        assert process.wait(120) == 128 + signal.SIGHUP
    finally:
        process.kill()
        process.wait()
    assert load(tmp_path / "ssdlite.pth")["epoch"] < 1000


def test_dataset_script_gives_the_metrics_of_training(shapes, trained, tmp_path, monkeypatch, capfd):
    options = ["--data-path", shapes, "--pretrained_model", trained / "ssdlite.pth", "--num-workers", 0]
    assert run_here(monkeypatch, "test_dataset.py", *options, "--batch-size", 4, "--output", tmp_path / "out") == 0
    assert "AP50" in capfd.readouterr().out
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    logged = scalars(trained / "log" / "ssdlite")["Test/mAP"][-1].value
    assert metrics["AP"] == pytest.approx(logged, abs=1e-6)
    ground_truth = json.loads((shapes / "annotations" / "instances_val2017.json").read_text())
    detections = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert {d["category_id"] for d in detections} <= {c["id"] for c in ground_truth["categories"]}
    assert {d["image_id"] for d in detections} <= {i["id"] for i in ground_truth["images"]}
    assert set(detections[0]) == {"image_id", "category_id", "bbox", "score"}
    assert len(list((tmp_path / "out").glob("*.jpg"))) == 5


def test_image_script(shapes, tmp_path, monkeypatch):
    files = sorted((shapes / "val2017").glob("*.jpg"))
    model = ["--pretrained-model", SHAPES]
    options = [*model, "--cls-threshold", "0.05", "--json", tmp_path / "all.json"]
    run("test_image.py", "--input", shapes / "val2017", "--output", tmp_path / "out", *options)
    assert len(list((tmp_path / "out").glob("*_prediction.jpg"))) == len(files)
    images = json.loads((tmp_path / "all.json").read_text())["images"]
    assert [Path(entry["file"]) for entry in images] == files
    for entry in images:
        height, width = read_image(entry["file"]).shape[:2]
        assert (entry["width"], entry["height"]) == (width, height)
        for found in entry["detections"]:
            x1, y1, x2, y2 = found["box"]
            assert 0 <= x1 <= x2 <= width + 1e-3 and 0 <= y1 <= y2 <= height + 1e-3
            assert 0.05 < found["score"] <= 1 and isinstance(found["label"], str)
    assert sum(len(entry["detections"]) for entry in images) > 5
    assert run_here(monkeypatch, "test_image.py", "--input", files[0], "--output", tmp_path / "one.png", *model) == 0
    assert read_image(tmp_path / "one.png").shape == read_image(files[0]).shape
    assert run_here(monkeypatch, "test_image.py", "--input", files[0], "--output", tmp_path / "new", *model) == 0
    assert [file.name for file in (tmp_path / "new").iterdir()] == [f"{files[0].stem}_prediction.jpg"]


def test_image_script_keeps_the_sub_folders(shapes, tmp_path, monkeypatch):
    image, folder = next((shapes / "val2017").glob("*.jpg")), tmp_path / "in"
    for name in ("a.jpg", "one/a.jpg", "one/two/b.jpg", "one/a_prediction.jpg", "note.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(image, folder / name)
    (folder / "a folder.jpg").mkdir()
    out = tmp_path / "several" / "levels" / "deep"
    options = ["--pretrained-model", SHAPES, "--input", folder]
    assert run_here(monkeypatch, "test_image.py", *options, "--output", out) == 0
    names = {str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()}
    assert names == {"a_prediction.jpg", "one/a_prediction.jpg", "one/two/b_prediction.jpg"}


def test_video_script(tmp_path, monkeypatch):
    clip = tmp_path / "clip.mp4"
    make_video(clip, 7, "mp4v")
    options = ["--json", tmp_path / "clip.json", "--pretrained-model", SHAPES, "--cls-threshold", "0.9"]
    assert run_here(monkeypatch, "test_video.py", "--input", clip, *options) == 0
    before, after = (frames_of(f) for f in (clip, tmp_path / "clip_prediction.mp4"))
    for n, frame in enumerate(after):  # each in its place, none twice
        assert np.argmin([abs(frame - other).mean() for other in before]) == n
    video = cv2.VideoCapture(str(tmp_path / "clip_prediction.mp4"))
    assert video.get(cv2.CAP_PROP_FPS) == pytest.approx(29.97, abs=0.01)
    assert video.get(cv2.CAP_PROP_FRAME_COUNT) == 7
    lines = [json.loads(line) for line in (tmp_path / "clip.json").read_text().splitlines()]
    assert [line["frame"] for line in lines] == list(range(7))
    assert all((line["width"], line["height"]) == (320, 240) for line in lines)


@pytest.fixture
def detect(tmp_path, monkeypatch, blind):
    """Function that runs test_video.py, which finds nothing; returns its frames (H, W, 3) and its rate."""
    monkeypatch.setattr(Detector, "load", lambda *_, **__: blind)

    def run_it(clip, ending=".mp4"):
        output = tmp_path / f"out{ending}"
        options = ["--input", clip, "--output", output, "--pretrained-model", SHAPES]
        assert run_here(monkeypatch, "test_video.py", *options) == 0
        return frames_of(output), cv2.VideoCapture(str(output)).get(cv2.CAP_PROP_FPS)

    return run_it


RATES = [30000 / 1001, 120000 / 1001, 239.813, 959.043]


@pytest.mark.parametrize("rate", RATES)
def test_video_rates_are_kept(detect, tmp_path, rate):
    make_video(tmp_path / "clip.avi", 5, rate=rate)
    for ending in (".mp4", ".avi"):
        frames, found = detect(tmp_path / "clip.avi", ending)
        assert len(frames) == 5 and found == pytest.approx(rate, rel=1e-4)


def test_a_variable_rate_becomes_its_mean(detect, tmp_path, capfd):
    make_video(tmp_path / "clip.webm", 6, "VP80", rate=25)
    data = (tmp_path / "clip.webm").read_bytes()
    times = [0, 40, 80, 1000, 1500, 1540]  # ms: not what the header says, 25 a second
    for old, new in reversed(list(zip(range(0, 240, 40), times, strict=True))):
        block = rb"(?s)(\xa3.{1,4}\x81)" + re.escape(struct.pack(">h", old)) + rb"(?=[\x00\x80])"
        data, count = re.subn(block, lambda m, new=new: m[1] + struct.pack(">h", new), data)
        assert count == 1
    (tmp_path / "clip.webm").write_bytes(data)
    frames, rate = detect(tmp_path / "clip.webm")
    assert len(frames) == 6 and 5 / rate == pytest.approx(1.540, rel=1e-3)
    assert "truncated" not in capfd.readouterr().out


def test_a_doubled_time_does_not_hide_a_variable_rate(tmp_path, monkeypatch):
    times = [0.0, *np.cumsum([30, 50] * 50)]  # ms: 101 frames in 4 s
    times[50] = times[49]

    class Packets:
        def __init__(self, *_):
            self.left = list(times)

        def grab(self):
            return bool(self.left)

        def get(self, what):
            return {cv2.CAP_PROP_POS_MSEC: self.left.pop(0)}[what]

    class Video:
        def get(self, what):
            return {cv2.CAP_PROP_FPS: 1000.0, cv2.CAP_PROP_FRAME_COUNT: -1.0}[what]

    monkeypatch.setattr(cv2, "VideoCapture", Packets)
    (tmp_path / "a.webm").touch()
    rate_and_length = runpy.run_path(str(ROOT / "test_video.py"))["rate_and_length"]
    assert rate_and_length(str(tmp_path / "a.webm"), Video()) == (pytest.approx(25.0), 101)


@pytest.mark.parametrize("codec", ["mpg1", "mpg2"])
def test_packets_without_a_time_of_their_own_do_not_change_the_rate(detect, tmp_path, codec):
    make_video(tmp_path / "clip.mpg", 60, codec, rate=25)  # an MPEG program stream
    frames, rate = detect(tmp_path / "clip.mpg")
    assert len(frames) >= 55 and rate == pytest.approx(25)


def test_an_animation_of_odd_size_has_its_frames_and_colors(detect, tmp_path):
    durations = [100, 100, 700, 40, 40, 40, 200, 180]  # ms
    colors = [(30 * n, 255 - 30 * n, 90) for n in range(len(durations))]
    first, *others = (Image.new("RGB", (321, 241), color) for color in colors)
    first.save(tmp_path / "a.gif", save_all=True, append_images=others, duration=durations)
    frames, rate = detect(tmp_path / "a.gif")
    assert len(frames) == 8 and frames[0].shape[:2] == (242, 322)
    assert len(frames) / rate == pytest.approx(sum(durations) / 1000, abs=1 / rate)
    for frame, color in zip(frames, colors, strict=True):
        assert abs(frame[120, 160, ::-1] - color).max() < 12


def test_a_rotated_clip_is_shown_upright(detect, tmp_path):
    make_video(tmp_path / "clip.mp4", 3, "mp4v")
    data = bytearray((tmp_path / "clip.mp4").read_bytes())
    start = data.index(b"tkhd") + 44  # the matrix; 2**16 is one, 2**30 in the last column
    matrix = 0, 2**16, 0, -(2**16), 0, 0, 240 * 2**16, 0, 2**30  # 90 degrees clockwise
    data[start : start + 36] = struct.pack(">9i", *matrix)
    (tmp_path / "turned.mp4").write_bytes(data)
    frames, _ = detect(tmp_path / "turned.mp4")
    assert len(frames) == 3 and frames[0].shape == (320, 240, 3)
    for frame, stored in zip(frames, frames_of(tmp_path / "clip.mp4"), strict=True):
        assert abs(frame - np.rot90(stored, -1)).mean() < 5


def test_a_named_pipe_is_read(detect, tmp_path):
    make_video(tmp_path / "clip.avi", 6)
    os.mkfifo(tmp_path / "pipe")
    data = (tmp_path / "clip.avi").read_bytes()
    writing = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=[data], daemon=True)
    writing.start()
    frames, rate = detect(tmp_path / "pipe")
    assert len(frames) == 6 and rate == pytest.approx(29.97, rel=1e-4)


def fds(pid):
    return Path(f"/proc/{pid}/fd").iterdir()


def link(path):
    try:
        return os.readlink(path)
    except FileNotFoundError:  # closed meanwhile
        return ""


def send(pipe, data, size):
    """Write `data`, `size` bytes at a time, slowly."""
    for start in range(0, len(data), size):
        os.write(pipe, data[start : start + size])
        time.sleep(0.15)


@pytest.fixture
def stalled(tmp_path):
    """Function that sends frames to a pipe and, when test_video.py has done them, a signal; how that ends.

    With `slowly`, the pipe goes on to send frames: more slowly than the script works, so that it awaits one as it ends.
    `code` is run before the script.
    """

    def run(frames, number, *options, slowly=False, code=""):
        os.mkfifo(tmp_path / "pipe")
        pipe = os.open(tmp_path / "pipe", os.O_RDWR)  # does not wait for a reader
        options = ["--input", tmp_path / "pipe", "--output", tmp_path / "a.avi", "--pretrained-model", SHAPES, *options]
        code += f"\nimport runpy\nrunpy.run_path({str(ROOT / 'test_video.py')!r}, run_name='__main__')"
        command = [sys.executable, "-c", code, *options]
        with open(tmp_path / "log", "w") as log:
            env = ENV | {"TQDM_MININTERVAL": "0"}  # the progress bar shows every frame
            process = subprocess.Popen(list(map(str, command)), env=env, stdout=log, stderr=log)
        try:
            if frames:
                total = 1000 if slowly else frames
                make_video(tmp_path / "clip.avi", total)
                data = (tmp_path / "clip.avi").read_bytes()
                head = len(data) * frames // total
                os.write(pipe, data[:head])
                threading.Thread(target=send, args=[pipe, data[head:], len(data) // total], daemon=True).start()
            # Without frames: until it has opened the pipe.
            said = re.compile(rf"\b{frames}(/\d+|frame) \[" if frames else "")  # not the "5.20frame/s" of the bar
            for _ in range(600):
                if process.poll() is not None:
                    break
                opened = str(tmp_path / "pipe") in map(link, fds(process.pid))
                if opened and said.search((tmp_path / "log").read_text()):
                    break
                time.sleep(0.1)
            else:
                raise AssertionError((tmp_path / "log").read_text())
            time.sleep(2)
            process.send_signal(number)
            return process.wait(20), (tmp_path / "log").read_text()
        finally:
            process.kill()
            process.wait()
            if not slowly:
                os.close(pipe)

    return run


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_pipe_that_stalls_does_not_hold_the_video_script(stalled, tmp_path, number):
    status, said = stalled(6, number)
    assert status == 0 and "6 frames -> " in said and len(frames_of(tmp_path / "a.avi")) == 6


def test_a_pipe_that_sends_nothing_does_not_hold_the_video_script(stalled, tmp_path):
    assert stalled(0, signal.SIGINT)[0] == -signal.SIGINT
    assert not (tmp_path / "a.avi").exists()


def test_an_error_ends_the_video_script_while_a_pipe_stalls(stalled, tmp_path):
    status, said = stalled(6, signal.SIGINT, "--json", "/dev/full")  # which is written to at the end
    assert status == 2 and "No space left" in said and len(frames_of(tmp_path / "a.avi")) == 6


@pytest.mark.parametrize("options, status", [([], 0), (["--json", "/dev/full"], 2)])
def test_a_slow_camera_is_left_with_the_right_status(stalled, tmp_path, options, status):
    ended, said = stalled(20, signal.SIGINT, *options, slowly=True)
    assert ended == status and ("No space left" in said) == (status == 2)
    count = len(frames_of(tmp_path / "a.avi"))
    assert count >= 20 and (status == 2 or f"{count} frames -> " in said)


# Fails on the 21st frame.
BUG = """
from src.detector import Detector
detect, calls = Detector.__call__, iter(range(20))
Detector.__call__ = lambda *args: detect(*args) if next(calls, None) is not None else 1 / 0
"""


def test_a_bug_while_a_camera_is_slow_has_its_traceback_and_status(stalled):
    ended, said = stalled(20, signal.SIGINT, slowly=True, code=BUG)
    assert ended == 1 and said.rstrip().endswith("ZeroDivisionError: division by zero")


def test_a_bug_while_a_camera_is_slow_and_the_disk_of_its_traceback_full_has_its_status(stalled):
    code = "import os, sys; os.environ['TQDM_DISABLE'] = '1'; sys.stderr = open('/dev/full', 'w', 1)\n" + BUG
    assert stalled(20, signal.SIGINT, slowly=True, code=code)[0] == 1


def test_a_closed_standard_output_does_not_hold_the_video_script(stalled, tmp_path):
    ended, _ = stalled(20, signal.SIGINT, slowly=True, code="import sys; sys.stdout = None")
    assert ended == 0 and len(frames_of(tmp_path / "a.avi")) >= 20


def test_an_error_of_the_reader_is_not_the_end_of_the_video():
    class Broken:
        frames = [np.zeros((2, 2, 3), np.uint8)] * 2

        def read(self):
            if not self.frames:
                raise MemoryError
            return True, self.frames.pop()

    read_frames = runpy.run_path(str(ROOT / "test_video.py"))["read_frames"]
    seen = []
    with pytest.raises(MemoryError):
        for frame in read_frames(Broken(), np.zeros((2, 2, 3), np.uint8), []):
            seen.append(frame)
    assert len(seen) == 3


def test_the_video_script_says_which_codec_it_wrote(tmp_path):
    make_video(tmp_path / "clip.avi", 2)
    done = run("test_video.py", "--input", tmp_path / "clip.avi", "--pretrained-model", SHAPES)
    written = cv2.VideoCapture(str(tmp_path / "clip_prediction.mp4"))
    code = int(written.get(cv2.CAP_PROP_FOURCC)).to_bytes(4, "little").lower()
    is_h264 = code in (b"avc1", b"h264")
    assert ("H.264" in done.stdout) == is_h264
    assert ("browsers do not play" in done.stdout) != is_h264
    # What was tried in vain is not told: there is nothing but the progress bar.
    assert "error" not in done.stderr.lower() and "h264" not in done.stderr


def test_fine_tuning_keeps_all_but_the_rows_of_new_classes(tmp_path, monkeypatch, capfd):
    other = tmp_path / "other"
    make_dataset(other, train=4, val=1, seed=2)
    for name in ("train2017", "val2017"):
        file = other / "annotations" / f"instances_{name}.json"
        data = json.loads(file.read_text())
        data["categories"].append({"id": 99, "name": "nothing of it here"})
        file.write_text(json.dumps(data))
    options = ["--pretrained-model", SHAPES, "--epochs", 1, "--lr", 0]
    assert run_here(monkeypatch, *training(other, tmp_path / "out", *options)) == 0
    line = f"{SHAPES}: loaded (checkpoint of this project, ssdlite), class heads by name, these start fresh: nothing"
    assert f"{line} of it here\n" in capfd.readouterr().out
    before, after = (load(file)["model_state_dict"] for file in (SHAPES, tmp_path / "out" / "ssdlite.pth"))
    for name in before:
        if name.endswith((".weight", ".bias")):  # the others are statistics of batch norm
            old, new = before[name].float(), after[name]
            if old.shape != new.shape:  # the last layers of the class heads; 99 is the last class
                old, new = old.unflatten(0, (7, -1)), new.unflatten(0, (8, -1))[:7]
            assert torch.equal(old, new), name


def test_a_broken_image_is_named_when_it_is_reached_and_nothing_is_lost(shapes, trained, tmp_path, monkeypatch, capfd):
    broken = tmp_path / "broken"
    shutil.copytree(shapes, broken)
    _, _, last = TrainSampler(12, batch_size=4, seed=123)  # the first epoch's batches
    image = sorted((broken / "train2017").glob("*.jpg"))[last[1][1]]
    whole = image.read_bytes()
    image.write_bytes(whole[: len(whole) // 2])
    command = training(broken, tmp_path / "out", "--epochs", 2)
    assert run_here(monkeypatch, *command, "--num-workers", 2) == 2
    error = capfd.readouterr().err
    assert error.count("error: ") == 1 and str(image) in error and "Traceback" not in error
    state = load(tmp_path / "out" / "ssdlite.pth")
    assert (state["epoch"], state["samples_seen"]) == (0, 8)
    image.write_bytes(whole)
    assert run_here(monkeypatch, *command) == 0
    assert_same_end(tmp_path / "out", trained)


def test_a_size_that_fits_neither_way_is_found_before_training(shapes, tmp_path, monkeypatch, capfd):
    odd = tmp_path / "odd"
    shutil.copytree(shapes, odd)
    file = odd / "annotations" / "instances_val2017.json"
    data = json.loads(file.read_text())
    data["images"][4]["width"] += 1
    file.write_text(json.dumps(data))
    assert run_here(monkeypatch, *training(odd, tmp_path / "out")) == 2
    error = capfd.readouterr().err
    assert data["images"][4]["file_name"] in error and str(file) in error
    assert error.count("error: ") == 1 and not (tmp_path / "out" / "ssdlite.pth").exists()


def test_a_finished_run_says_so_and_what_changed(shapes, trained, tmp_path, monkeypatch, capfd):
    shutil.copytree(trained, tmp_path / "again")
    command = training(shapes, tmp_path / "again", "--epochs", 2, "--batch-size", 2, "--lr", 0.5)
    assert run_here(monkeypatch, *command) == 0
    said = capfd.readouterr().out
    for changed in ("batch_size was 4, is 2", "lr was 0.0026, is 0.5"):
        assert f"changed since: {changed}" in said
    assert "world_size" not in said and "seed" not in said
    assert "nothing left to train" in said  # two epochs were done


def hold_lock(file, started):
    """In a process: take a run's lock, and start a worker, as training does."""
    stopping.take_lock(file)
    worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=[60])
    worker.start()
    started.send(worker.pid)
    time.sleep(60)


def test_a_second_run_into_a_save_folder_is_refused_until_the_first_ends(shapes, tmp_path, monkeypatch, capfd):
    here, there = multiprocessing.Pipe()
    first = multiprocessing.get_context("fork").Process(target=hold_lock, args=[tmp_path / "ssdlite.lock", there])
    first.start()
    worker = here.recv()
    monkeypatch.setattr(CocoDataset, "check_files", None)  # it is refused before minutes are spent
    try:
        assert run_here(monkeypatch, *training(shapes, tmp_path, "--epochs", 1)) == 2
        error = capfd.readouterr().err
        assert f"process {first.pid} on {socket.gethostname()}" in error and str(tmp_path) in error
        assert error.count("error: ") == 1 and not (tmp_path / "ssdlite.pth").exists()
        first.kill()
        first.join()
        os.kill(worker, 0)  # it lives on, as workers do for some seconds
        assert stopping.take_lock(tmp_path / "ssdlite.lock") == (True, "")
    finally:
        first.kill()
        os.kill(worker, signal.SIGKILL)


# What pycocotools makes of the files alone, in a process that knows nothing of this project.
PYCOCOTOOLS = """
import sys
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
ground_truth = COCO(sys.argv[1])
coco_eval = COCOeval(ground_truth, ground_truth.loadRes(sys.argv[2]), "bbox")
coco_eval.evaluate(), coco_eval.accumulate(), coco_eval.summarize()
print(*coco_eval.stats.tolist())
"""


@pytest.mark.parametrize("kept", [slice(6), slice(1, 4)], ids=["all categories", "some"])
def test_metrics_are_those_of_pycocotools_in_another_process(shapes, tmp_path, monkeypatch, kept):
    shapes = keep_categories(shapes, tmp_path / "data", kept)
    checkpoint = SHAPES
    options = ["--pretrained-model", checkpoint, "--data-path", shapes, "--num-workers", 0]
    assert run_here(monkeypatch, "test_dataset.py", *options, "--output", tmp_path) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    ground_truth = shapes / "annotations" / "instances_val2017.json"
    command = [sys.executable, "-c", PYCOCOTOOLS, ground_truth, tmp_path / "detections.json"]
    said = subprocess.check_output(list(map(str, command)), cwd=tmp_path, text=True)
    stats = list(map(float, said.splitlines()[-1].split()))
    assert [metrics[name] for name in METRICS] == pytest.approx(stats, abs=1e-12)
    assert 0.2 < metrics["AP"] < 0.9


def keep_categories(shapes, folder, kept):
    """A copy of a data set whose validation set has some of the categories, and their boxes."""
    shutil.copytree(shapes, folder)
    path = folder / "annotations" / "instances_val2017.json"
    content = json.loads(path.read_text())
    content["categories"] = content["categories"][kept]
    ids = [category["id"] for category in content["categories"]]
    content["annotations"] = [a for a in content["annotations"] if a["category_id"] in ids]
    path.write_text(json.dumps(content))
    return folder


def test_fewer_categories_in_validation_are_trained_with(tmp_path, monkeypatch, capfd):
    make_dataset(tmp_path / "all", train=4, val=5, seed=1)
    data = keep_categories(tmp_path / "all", tmp_path / "data", slice(1, 4))
    assert run_here(monkeypatch, *training(data, tmp_path / "out", "--epochs", 1)) == 0
    said = capfd.readouterr().out
    assert "validation: 5 images" in said and "of 3 classes" in said
    assert len(load(tmp_path / "out" / "ssdlite.pth")["classes"]) == 7
    assert load(tmp_path / "out" / "ssdlite.pth")["best_map"] >= 0


def test_a_set_without_a_box_has_nothing_to_measure(shapes, tmp_path, monkeypatch, capfd):
    path = shutil.copytree(shapes, tmp_path / "data") / "annotations" / "instances_val2017.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"annotations": []}))
    options = ["--pretrained-model", SHAPES, "--num-workers", 0]
    options += ["--data-path", tmp_path / "data", "--output", tmp_path / "out"]
    assert run_here(monkeypatch, "test_dataset.py", *options) == 0
    said = capfd.readouterr().out
    assert "nothing to measure" in said and "-1.000" not in said


def published_ssd():
    """A checkpoint of COCO's classes in one of the published layouts."""
    weights = build_model("ssd", 81, pretrained_backbone=False).state_dict()
    label_map = dict(enumerate(["background", *COCO_CLASSES]))
    published = {"model": {f"module.{k}": v for k, v in weights.items()}, "label_map": label_map}
    return published | {"epoch": 64, "iteration": 0, "optimizer": {}, "scheduler": {}}


@pytest.mark.parametrize(
    "published, model, names, ids, layout, more",
    [
        (
            published_ssd,
            "ssd",
            COCO_CLASSES,
            COCO_CATEGORY_IDS,
            "published SSD-ResNet50, 'model' with 'label_map'",
            {"train.py": ["--zoom-out", "--save-every", 1]},
        ),
        (
            mb2_ssd_lite,
            "ssdlite",
            VOC_CLASSES,
            range(1, 21),
            "published SSDLite-MobileNetV2, VOC's classes",
            {"train.py": ["--amp"], "test_dataset.py": ["--amp"]},
        ),
    ],  # fmt: skip
)
def test_every_script_takes_a_published_checkpoint(
    tmp_path, monkeypatch, capfd, published, model, names, ids, layout, more
):
    data, file = tmp_path / "data", tmp_path / "published.pth"
    make_dataset(data, train=2, val=1, seed=1)
    for path in (data / "annotations").iterdir():  # shapes by the names of the checkpoint's classes
        content = json.loads(path.read_text())
        old = [category["id"] for category in content["categories"]]
        content["categories"] = [{"id": i, "name": name} for i, name in zip(ids, names, strict=True)]
        for a in content["annotations"]:
            a["category_id"] = ids[old.index(a["category_id"])]
        path.write_text(json.dumps(content))
    torch.manual_seed(0)
    torch.save(published(), file)
    (image,) = (data / "val2017").iterdir()
    make_video(tmp_path / "clip.avi", frames=1)
    folders = ["--save-folder", tmp_path / "new", "--log-path", tmp_path / "log"]
    for script, options in {
        "test_image.py": ["--input", image, "--output", tmp_path / "out.jpg"],
        "test_video.py": ["--input", tmp_path / "clip.avi", "--output", tmp_path / "out.mp4"],
        "test_dataset.py": ["--data-path", data, "--num-workers", 0, "--output", tmp_path / "out"],
        "train.py": ["--data-path", data, *SMALL, *folders, "--epochs", 1, "--batch-size", 2],
    }.items():
        options += more.get(script, [])
        assert run_here(monkeypatch, script, *options, "--pretrained-model", file) == 0
        said = capfd.readouterr().out
        assert layout in said, script
    assert "class heads by name, none starts fresh\n" in said
    assert load(tmp_path / "new" / f"{model}.pth")["classes"] == ["background", *names]
    assert set(json.loads((tmp_path / "out" / "metrics.json").read_text())) == {
        *METRICS,
        "per_class",
        "per_class_AP50",
        "best_F1",
    }


def test_a_set_of_other_classes_under_the_same_ids_is_refused(shapes, tmp_path, monkeypatch, capfd):
    other = tmp_path / "other"
    shutil.copytree(shapes, other)
    path = other / "annotations" / "instances_val2017.json"
    content = json.loads(path.read_text())
    content["categories"][0]["name"] = "cup"
    path.write_text(json.dumps(content))
    options = ["--pretrained-model", SHAPES, "--data-path", other]
    assert run_here(monkeypatch, "test_dataset.py", *options, "--output", tmp_path / "out") == 2
    assert "'cup'" in capfd.readouterr().err


def test_damaged_videos(tmp_path, monkeypatch, capfd):
    make_video(tmp_path / "whole.avi", 8)
    make_video(tmp_path / "whole.mp4", 8, "mp4v")
    make_video(tmp_path / "empty.avi", 0)
    whole = (tmp_path / "whole.avi").read_bytes()
    (tmp_path / "cut.avi").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "cut.mp4").write_bytes((tmp_path / "whole.mp4").read_bytes()[:900])
    still = bytearray(whole)  # frame rate 0: in AVI's main header and in that of the stream
    main, stream = still.index(b"avih"), still.index(b"strh")
    still[main + 8 : main + 12] = still[stream + 32 : stream + 36] = bytes(4)
    (tmp_path / "still.avi").write_bytes(still)
    model = ["--pretrained-model", SHAPES, "--cls-threshold", "0.9"]

    def outcome(name):
        output = tmp_path / f"{name}_out.mp4"
        options = ["--input", tmp_path / name, "--output", output, *model]
        status, said = run_here(monkeypatch, "test_video.py", *options), capfd.readouterr()
        assert "Traceback" not in said.err
        video = cv2.VideoCapture(str(output))
        frames, rate = video.get(cv2.CAP_PROP_FRAME_COUNT), video.get(cv2.CAP_PROP_FPS)
        return status, frames, rate, said.out + said.err

    status, frames, _, said = outcome("cut.avi")
    assert status == 0 and 0 < frames < 8 and "promises 8" in said
    status, frames, rate, said = outcome("still.avi")
    assert (status, frames) == (0, 8) and rate > 0 and "promises" not in said
    for name in ("cut.mp4", "empty.avi"):
        status, _, _, said = outcome(name)
        assert status == 2 and said.count("error: ") == 1 and name in said


@pytest.mark.parametrize(
    "script, options, value",
    [
        ("train.py", ["--data-path", "no/such"], "no/such"),
        ("train.py", ["--batch-size", "0"], "'0'"),
        ("train.py", ["--batch-size", "64"], "--batch-size 12"),
        ("train.py", ["--epochs", "0"], "'0'"),
        ("train.py", ["--num-workers", "-1"], "'-1'"),
        ("train.py", ["--model", "yolo"], "yolo"),
        ("train.py", ["--nms-threshold", "1.5"], "'1.5'"),
        ("train.py", ["--lr", "nan"], "'nan'"),
        ("train.py", ["--lr", "fast"], "'fast'"),
        ("train.py", ["--momentum", "-0.1"], "'-0.1'"),
        ("train.py", ["--multistep", "0"], "'0'"),
        ("train.py", ["--pretrained-model", "no.pth"], "no.pth"),
        ("train.py", ["--pretrained-model", "{cut}"], "cut.pth"),
        ("train.py", ["--save-folder", "{image}"], "139.jpg"),
        ("train.py", ["--val-set", "test2017"], "instances_test2017.json"),
        ("train.py", ["--no-such-option"], "--no-such-option"),
        ("test_image.py", ["--input", "no.jpg"], "no.jpg"),
        ("test_image.py", ["--input", "README.md"], "README.md"),
        ("test_image.py", ["--input", "src"], "src"),
        ("test_image.py", ["--input", "{cut}"], "cut.pth"),
        ("test_image.py", ["--input", "{image}", "--cls-threshold", "-1"], "'-1'"),
        ("test_image.py", ["--input", "{image}", "--output", "{cut}/such/b.jpg"], "cut.pth/such"),
        ("test_image.py", ["--input", "{image}", "--output", "b.xyz"], "b.xyz"),
        ("test_image.py", ["--input", "{image}", "--json", "src"], "src"),
        ("test_image.py", ["--input", "{images}", "--output", "b.jpg"], "b.jpg"),
        ("test_image.py", ["--input", "{image}", "--pretrained-model", "no.pth"], "no.pth"),
        ("test_image.py", ["--input", "{image}", "--pretrained-model", "{cut}"], "cut.pth"),
        ("test_video.py", ["--input", "no.mp4"], "no.mp4"),
        ("test_video.py", ["--input", "README.md"], "README.md"),
        ("test_video.py", ["--input", "77"], "77"),
        ("test_video.py", ["--input", "{video}", "--output", "b.xyz"], "b.xyz"),
        ("test_video.py", ["--input", "{video}", "--output", "{folder}.mp4"], "folder.mp4"),
        ("test_video.py", ["--input", "{video}", "--output", "{cut}/such/b.mp4"], "cut.pth/such"),
        ("test_video.py", ["--input", "{video}", "--output", "{video}"], "clip.avi"),
        ("test_video.py", ["--input", "{video}", "--nms-threshold", "2"], "'2'"),
        ("test_dataset.py", ["--data-path", "no/such"], "no/such"),
        ("test_dataset.py", ["--output", "{image}"], "139.jpg"),
        ("test_dataset.py", ["--batch-size", "0"], "'0'"),
    ],
)
def test_a_mistake_takes_one_line_and_status_2(shapes, tmp_path, monkeypatch, capfd, script, options, value):
    monkeypatch.chdir(ROOT)
    places = {"folder": tmp_path / "folder", "images": shapes / "val2017"}
    places |= {"video": tmp_path / "clip.avi", "image": tmp_path / "139.jpg"}
    places |= {"cut": tmp_path / "cut.pth"}
    (tmp_path / "folder.mp4").mkdir()
    shutil.copy(next((shapes / "val2017").glob("*.jpg")), places["image"])
    places["cut"].write_bytes(SHAPES.read_bytes()[:-1000])
    if "{video}" in options:
        make_video(places["video"], frames=2)
    common = {
        "train.py": training(shapes, tmp_path / "new")[1:],
        "test_dataset.py": ["--data-path", shapes, "--output", tmp_path / "out"],
        "test_image.py": ["--output", tmp_path / "x.jpg"],
        "test_video.py": ["--output", tmp_path / "x.mp4"],
    }[script]
    if script != "train.py":
        common += ["--pretrained-model", SHAPES]
    if "{images}" in options or "src" in options:
        common.remove(tmp_path / "x.jpg")
        common.remove("--output")
    options = [option.format(**places) for option in options]
    assert run_here(monkeypatch, script, *common, *options) == 2
    said = capfd.readouterr().err
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and value in lines[0], said
    assert "Traceback" not in said
    if "no/such" in options:  # of a wrong --data-path no empty folder stays
        assert not any((tmp_path / name).exists() for name in ("new", "out"))


@pytest.mark.parametrize(
    "script, options",
    [
        (
            "train.py",
            "data-path train-set val-set model epochs batch-size amp lr momentum weight-decay"
            " multistep warmup nms-threshold num-workers save-folder save-every log-path"
            " pretrained-model no-pretrained-backbone backbone-lr-factor freeze zoom-out seed",
        ),
        (
            "test_dataset.py",
            "data-path val-set pretrained-model cls-threshold nms-threshold batch-size num-workers amp output",
        ),
        ("tools/benchmark.py", "repeats amp images"),
        ("test_image.py", "input output json pretrained-model cls-threshold nms-threshold amp"),
        ("test_video.py", "input output json pretrained-model cls-threshold nms-threshold amp"),
    ],
)
def test_help_names_the_options_of_the_design(monkeypatch, capfd, script, options):
    assert run_here(monkeypatch, script, "--help") == 0
    text = capfd.readouterr().out
    assert all(f"--{option} " in text or f"--{option}\n" in text for option in options.split())
