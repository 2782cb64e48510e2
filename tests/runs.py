"""Running the scripts, and looking at what a run left behind."""

import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.multiprocessing as mp
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from src import usage

ROOT = Path(__file__).resolve().parents[1]
SHAPES = ROOT / "demo" / "ssdlite_shapes.pth"
ENV = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def run(*command, status=0):
    """Run a script of the project to its end; it has to exit with `status`."""
    command = [sys.executable, *map(str, command)]
    done = subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=300)
    assert done.returncode == status, done.stdout + done.stderr
    return done


def run_here(monkeypatch, script, *options):
    """Run a script in this process, which takes no seconds to start; its exit status."""
    handlers = {number: signal.getsignal(number) for number in usage.ENDING}
    monkeypatch.setattr(sys, "argv", [script, *map(str, options)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as end:
        return end.code
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return 0


def start_processes(function, processes, *args):
    """Start function(rank, *args) in new processes, forked by a server that has imported what takes seconds."""
    multiprocessing.set_forkserver_preload(["train", "tensorboard.backend.event_processing.event_accumulator"])
    return mp.start_processes(function, args, processes, join=False, start_method="forkserver")


def in_processes(function, processes, *args):
    """Run function(rank, *args) in new processes, to their end."""
    context = start_processes(function, processes, *args)
    while not context.join():
        pass


def free_port():
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def join(rank, world_size, port):
    """What torchrun does for a process: its environment."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def make_video(path, frames, codec="MJPG", rate=29.97):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*codec), rate, (320, 240))
    for step in range(frames):
        frame = np.full((240, 320, 3), 90, np.uint8)
        writer.write(cv2.circle(frame, (60 + 20 * step, 120), 40, (0, 200, 255), cv2.FILLED))
    writer.release()


def frames_of(path):
    """All frames (H, W, 3) BGR of a video, as int, to be subtracted from one another."""
    video = cv2.VideoCapture(str(path))
    frames = []
    while (frame := video.read()[1]) is not None:
        frames.append(frame.astype(int))
    return frames


def scalars(folder):
    """{tag: events} of a TensorBoard log."""
    log = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    log.Reload()
    return {tag: log.Scalars(tag) for tag in log.Tags()["scalars"]}


def end_of(folder):
    """Last checkpoint and the steps logged under each TensorBoard tag."""
    steps = {tag: [event.step for event in events] for tag, events in scalars(folder / "log" / "ssdlite").items()}
    return torch.load(folder / "ssdlite.pth", weights_only=True), steps


def assert_same_end(folder, whole):
    """The run in `folder` ended like that in `whole`, to the last bit and with the same steps logged."""
    (found, steps), (expected, expected_steps) = end_of(folder), end_of(whole)
    for end in (found, expected):  # the rate of the last step that this very process took:
        end["optimizer"] = end["optimizer"]["state"]  # derived anew for each step, not read
    for key in ("model_state_dict", "optimizer", "epoch", "samples_seen", "best_map"):
        assert same(found[key], expected[key]), (key, folder)
    assert steps == expected_steps


def same(a, b):
    """Equal to the last bit, all the way down dicts, lists and tuples."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b
