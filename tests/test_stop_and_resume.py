"""Training killed at random moments and started again, until it is done: nothing may differ.

    ROUNDS=50 python -m pytest tests/test_stop_and_resume.py

stops it 50 times; without ROUNDS a few times.
"""

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from runs import ENV, ROOT, TORCHRUN, same, scalars

from demo.shapes import make_dataset

ROUNDS = int(os.environ.get("ROUNDS", 3))
ENDED_WELL = {0, 128 + signal.SIGTERM, -signal.SIGTERM, -signal.SIGKILL}


def start(data, folder, processes, workers):
    """Start (or go on with) the run that `folder` holds, in a process group of its own."""
    command = [*(TORCHRUN if processes == 2 else []), "train.py", "--data-path", data]
    command += ["--model", "ssdlite", "--no-pretrained-backbone", "--batch-size", 4 // processes]
    command += ["--epochs", 2, "--save-every", 1, "--num-workers", workers, "--lr", 0.01]
    command += ["--save-folder", folder, "--log-path", folder / "log"]
    with open(folder / "output.txt", "a") as output:
        return subprocess.Popen(
            [sys.executable, *map(str, command)],
            cwd=ROOT, env=ENV, stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip


def kill_all(process):
    """SIGKILL to a process and all that it started; torchrun's are leaders of their own groups."""
    pids = [process.pid]
    for pid in pids:  # grows while we go through it
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text()
            pids += map(int, children.split())
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def end_of(folder):
    """Last checkpoint and the steps logged under each TensorBoard tag."""
    log = scalars(folder / "log" / "ssdlite")
    steps = {tag: [event.step for event in events] for tag, events in log.items()}
    return torch.load(folder / "ssdlite.pth", weights_only=True), steps


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_at_random_moments_it_ends_as_if_never_stopped(tmp_path, processes):
    rng = random.Random(processes)
    make_dataset(tmp_path / "data", train=12, val=3, seed=2)
    whole = tmp_path / "whole"
    whole.mkdir()
    begun = time.monotonic()
    assert start(tmp_path / "data", whole, processes, workers=0).wait(300) == 0
    duration = time.monotonic() - begun
    _, expected_steps = end_of(whole)
    stops, journey, resumed = 0, 0, 0
    while stops < ROUNDS:
        journey += 1
        folder = tmp_path / f"journey{journey}"
        folder.mkdir()
        checkpoint = folder / "ssdlite.pth"
        while True:
            process = start(tmp_path / "data", folder, processes, workers=rng.choice([0, 1, 2]))
            kill = rng.choice([signal.SIGTERM, signal.SIGKILL])
            delay = rng.uniform(0.2, 1) * duration
            if journey % 2 and not checkpoint.exists():  # in mid-training, not in its start
                while not checkpoint.exists() and process.poll() is None:
                    time.sleep(0.05)
                delay *= 0.2
            try:
                status = process.wait(delay)
            except subprocess.TimeoutExpired:
                stops += 1
                if kill == signal.SIGTERM:  # as a cluster does it: the launcher passes it on
                    process.terminate()
                else:
                    kill_all(process)
                status = process.wait(120)
            said = (folder / "output.txt").read_text()
            assert "error: " not in said, said
            if processes == 1:  # torchrun gives a status and a traceback of its own
                assert status in ENDED_WELL and "Traceback" not in said, said
            if status == 0:
                break
        (found, steps), (expected, _) = end_of(folder), end_of(whole)
        resumed += len(re.findall(r"resuming from .*: (?:1|0 epochs, [1-9])", said))
        for end in (found, expected):  # the rate of the last step that this very process took:
            end["optimizer"] = end["optimizer"]["state"]  # derived anew for each step, not read
        for key in ("model_state_dict", "optimizer", "epoch", "samples_seen", "best_map"):
            assert same(found[key], expected[key]), (key, journey)
        assert steps == expected_steps
    assert resumed > 0  # training anew each time would end the same
    print(f"{processes} process(es): {stops} stops, {resumed} of them in mid-training,")
    print(f"in {journey} runs, each equal to one never stopped, bit for bit")
