"""Two processes that are ended in all ways and started again: nothing may differ. One process: test_scripts.py.

    ROUNDS=50 python -m pytest -s tests/test_stop_and_resume.py

ends runs, of one process and of two, 50 times at random moments as well.
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
from runs import ENV, ROOT, TORCHRUN, assert_same_end, free_port, in_processes, join, start_processes

import train
from demo.shapes import make_dataset
from src import usage
from src.dataset import TrainSampler

at_random = pytest.mark.skipif("ROUNDS" not in os.environ, reason="ROUNDS=50 runs it: an hour")
ROUNDS = int(os.environ.get("ROUNDS", 1))
ENDED_WELL = {0, 128 + signal.SIGTERM, -signal.SIGTERM, -signal.SIGKILL}
SEED = 123


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A data set, so large that its evaluation can be interrupted."""
    folder = tmp_path_factory.mktemp("data")
    make_dataset(folder, train=8, val=40, seed=2)
    return folder


def options(data, folder, processes, workers, *more):
    given = ["--data-path", data, "--model", "ssdlite", "--no-pretrained-backbone", "--batch-size", 4 // processes]
    given += ["--epochs", 2, "--num-workers", workers, "--lr", 0.01, "--seed", SEED]
    return list(map(str, [*given, "--save-folder", folder, "--log-path", folder / "log", *more]))


def run_rank(rank, port, given, folder):
    """What torchrun does for one of two processes, and train.py in it, which prints to folder/RANK.txt."""
    join(rank, 2, port)
    torch.set_num_threads(1)
    sys.argv = ["train.py", *given]
    with open(folder / f"{rank}.txt", "w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    usage.run(train.main)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """Folder of a run of two processes that was never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    in_processes(run_rank, 2, free_port(), options(data, folder, 2, 0), folder)
    return folder


def start(data, folder, processes, workers, *torchrun_options):
    """Start (or go on with) the run that `folder` holds, in a process group of its own."""
    launcher = [*TORCHRUN, *torchrun_options] if processes == 2 else []
    command = [sys.executable, *launcher, "train.py", *options(data, folder, processes, workers, "--save-every", 1)]
    with open(folder / "output.txt", "a") as output:
        return subprocess.Popen(command, cwd=ROOT, env=ENV, stdout=output, stderr=output, start_new_session=True)


def kill_all(process):
    """SIGKILL to a process, if it has not ended, and all that it started; torchrun's lead groups of their own."""
    pids = [process.pid] if process.poll() is None else []
    for pid in pids:  # grows while we go through it
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            pids += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def ranks_of(process):
    """Process ids of the training processes of a torchrun, in the order of their ranks."""
    ranks = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # the run ends while we look
        for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
            if b"train.py" in Path(f"/proc/{pid}/cmdline").read_bytes():
                ranks.append(int(pid))
    return ranks


def place_of(file):
    """(epochs, images of the next one) of a checkpoint."""
    state = torch.load(file, weights_only=True)
    return state["epoch"], state["samples_seen"]


def wait_until(condition):
    while not condition():
        time.sleep(0.05)


def output_of(process, file):
    """What a process has printed to a file; it must not have ended."""
    said = file.read_text() if file.exists() else ""
    alive = process.poll() is None if isinstance(process, subprocess.Popen) else process.is_alive()
    assert alive, said
    return said


def test_a_broken_image_of_the_second_process_loses_no_step(data, tmp_path):
    _, last = TrainSampler(8, batch_size=2, rank=1, world_size=2, seed=SEED)
    image = sorted((data / "train2017").glob("*.jpg"))[last[0][1]]
    content = image.read_bytes()
    image.write_bytes(content[:-2000])
    try:
        ranks = start_processes(run_rank, 2, free_port(), options(data, tmp_path, 2, 1), tmp_path).processes
        for process in ranks:
            process.join(120)
    finally:
        image.write_bytes(content)
    assert ranks[1].exitcode == 2
    assert (tmp_path / "1.txt").read_text().startswith(f"error: {image}: ")
    assert place_of(tmp_path / "ssdlite.pth") == (0, 4)  # saved by the second, which met the image in the second step


def test_a_stop_in_evaluation_and_a_lost_process_change_nothing(data, whole, tmp_path):
    checkpoint, output = tmp_path / "ssdlite.pth", tmp_path / "output.txt"

    # Both are told to end while they evaluate, as torchrun does it, which waits for half a minute: they do at once.
    ranks = start_processes(run_rank, 2, free_port(), options(data, tmp_path, 2, 1), tmp_path).processes
    try:
        wait_until(lambda: "evaluate:" in output_of(ranks[0], tmp_path / "0.txt"))
        for process in ranks:
            process.terminate()
        for process in ranks:
            process.join(20)
        assert [process.exitcode for process in ranks] == [128 + signal.SIGTERM] * 2
    finally:
        for process in ranks:
            process.kill()
    said = (tmp_path / "0.txt").read_text()
    assert f"stopped; saved {checkpoint}" in said and "AP50" not in said and "error: " not in said
    assert place_of(checkpoint) == (0, 8)

    # torchrun: the epoch is evaluated again, a process is killed in the next one, and both are started anew.
    process = start(data, tmp_path, 2, 2, "--max-restarts=1")
    try:
        wait_until(lambda: "AP50" in output_of(process, output) and place_of(checkpoint) > (1, 0))
        assert output.read_text().count("AP50") == 1  # one process prints
        os.kill(ranks_of(process)[1], signal.SIGKILL)
        assert process.wait(120) == 0, output.read_text()
    finally:
        kill_all(process)
    said = output.read_text()
    assert len(re.findall(r"resuming from .*: 1 epochs, [1-9]", said)) == 1 and said.count("AP50") == 2
    assert_same_end(tmp_path, whole)


@at_random
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_at_random_moments_it_ends_as_if_never_stopped(data, tmp_path, processes):
    rng = random.Random(processes)
    whole = tmp_path / "whole"
    whole.mkdir()
    begun = time.monotonic()
    assert start(data, whole, processes, workers=0).wait(300) == 0
    duration = time.monotonic() - begun
    stops, journey, resumed = 0, 0, 0
    while stops < ROUNDS:
        journey += 1
        folder = tmp_path / f"journey{journey}"
        folder.mkdir()
        checkpoint = folder / "ssdlite.pth"
        while True:
            process = start(data, folder, processes, workers=rng.choice([0, 1, 2]))
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


@at_random
def test_torchrun_restarts_a_run_whose_process_is_killed_at_random(data, whole, tmp_path):
    rng = random.Random(7)
    for number in range(ROUNDS):
        folder = tmp_path / f"round{number}"
        folder.mkdir()
        process = start(data, folder, 2, rng.choice([0, 1, 2]), "--max-restarts=3")
        wait_until((folder / "ssdlite.pth").exists)
        time.sleep(rng.uniform(0, 4))
        killed = rng.choice(ranks_of(process) or [None])  # None: the run is over by now
        if killed:
            os.kill(killed, signal.SIGKILL)
        assert process.wait(120) == 0, (folder / "output.txt").read_text()
        said = (folder / "output.txt").read_text()
        print(f"round {number}: killed {killed}, resumed {re.findall('resuming from .*: (.*)', said)}")
        assert "resuming from" in said or not killed
        assert_same_end(folder, whole)
