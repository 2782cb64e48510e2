"""Training killed at random moments and started again, until it is done: nothing may differ.

    ROUNDS=50 python -m pytest tests/test_stop_and_resume.py

stops it 50 times, as often kills one of two processes; without ROUNDS a few times.
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
KILL_ROUNDS = int(os.environ.get("ROUNDS", 1))
ENDED_WELL = {0, 128 + signal.SIGTERM, -signal.SIGTERM, -signal.SIGKILL}


def start(data, folder, processes, workers, *torchrun_options):
    """Start (or go on with) the run that `folder` holds, in a process group of its own."""
    command = [*([*TORCHRUN, *torchrun_options] if processes == 2 else []), "train.py", "--data-path", data]
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


def assert_same_end(folder, whole):
    """The run in `folder` ended like that in `whole`, to the last bit and with the same steps logged."""
    (found, steps), (expected, expected_steps) = end_of(folder), end_of(whole)
    for end in (found, expected):  # the rate of the last step that this very process took:
        end["optimizer"] = end["optimizer"]["state"]  # derived anew for each step, not read
    for key in ("model_state_dict", "optimizer", "epoch", "samples_seen", "best_map"):
        assert same(found[key], expected[key]), (key, folder)
    assert steps == expected_steps


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_at_random_moments_it_ends_as_if_never_stopped(tmp_path, processes):
    rng = random.Random(processes)
    make_dataset(tmp_path / "data", train=12, val=3, seed=2)
    whole = tmp_path / "whole"
    whole.mkdir()
    begun = time.monotonic()
    assert start(tmp_path / "data", whole, processes, workers=0).wait(300) == 0
    duration = time.monotonic() - begun
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
        resumed += len(re.findall(r"resuming from .*: (?:1|0 epochs, [1-9])", said))
        assert_same_end(folder, whole)
    assert resumed > 0  # training anew each time would end the same
    print(f"{processes} process(es): {stops} stops, {resumed} of them in mid-training,")
    print(f"in {journey} runs, each equal to one never stopped, bit for bit")


def ranks_of(process):
    """Process ids of the training processes of a torchrun, in the order of their ranks."""
    ranks = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # the run ends while we look
        for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
            if b"train.py" in Path(f"/proc/{pid}/cmdline").read_bytes():
                ranks.append(int(pid))
    return ranks


def test_torchrun_restarts_a_run_whose_process_is_killed(tmp_path):
    rng = random.Random(7)
    make_dataset(tmp_path / "data", train=12, val=3, seed=2)
    whole = tmp_path / "whole"
    whole.mkdir()
    assert start(tmp_path / "data", whole, 2, workers=0).wait(300) == 0
    for number in range(KILL_ROUNDS):
        folder = tmp_path / f"round{number}"
        folder.mkdir()
        process = start(tmp_path / "data", folder, 2, rng.choice([0, 1, 2]), "--max-restarts=3")
        while not (folder / "ssdlite.pth").exists():
            assert process.poll() is None
            time.sleep(0.05)
        # The first round kills at once: in the others the run may be over by then.
        time.sleep(rng.uniform(0, 4) if number else 0)
        ranks = ranks_of(process)
        assert ranks or number
        killed = rng.choice(ranks or [None])
        if killed:
            os.kill(killed, signal.SIGKILL)
        assert process.wait(120) == 0, (folder / "output.txt").read_text()
        said = (folder / "output.txt").read_text()
        print(f"round {number}: killed {killed}, resumed {re.findall('resuming from .*: (.*)', said)}")
        assert "resuming from" in said or not killed
        assert_same_end(folder, whole)


def test_stopped_in_evaluation_it_ends_at_once_and_evaluates_again(tmp_path):
    make_dataset(tmp_path / "data", train=12, val=60, seed=2)
    folder, whole = tmp_path / "stopped", tmp_path / "whole"
    for one in (folder, whole):
        one.mkdir()
    process = start(tmp_path / "data", folder, 2, 1)
    output = folder / "output.txt"
    while "evaluate:" not in output.read_text():
        assert process.poll() is None, output.read_text()
        time.sleep(0.05)
    process.terminate()
    process.wait(60)
    said = output.read_text()
    assert f"stopped; saved {folder}/ssdlite.pth" in said and "error: " not in said and "AP50" not in said
    state = torch.load(folder / "ssdlite.pth", weights_only=True)
    assert (state["epoch"], state["samples_seen"]) == (0, 12)
    assert start(tmp_path / "data", folder, 2, 1).wait(120) == 0
    assert output.read_text().count("AP50") == 2  # both epochs, the first by the second run
    assert start(tmp_path / "data", whole, 2, 1).wait(120) == 0
    assert_same_end(folder, whole)
