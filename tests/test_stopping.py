"""src.stopping: what ends a run early costs no step; other systems than Unix."""

import contextlib
import multiprocessing
import os
import runpy
import signal
import sys
import time

import pytest
import torch
from runs import ROOT

from src import stopping, usage
from src.checkpoint import Run
from src.usage import UnreadableImage, UserError


@pytest.fixture
def restored_signals():
    """Handlers of this process are as before when the test ends."""
    before = {number: signal.getsignal(number) for number in usage.ENDING}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def run():
    """A run of one weight, after eight images."""
    network = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return Run("ssdlite", network, optimizer, scaler, ["background", "a"], [1], {"epochs": 1}, samples_seen=8)


@contextlib.contextmanager
def saving(run, file):
    """The Stoppable around a run's loop."""
    stoppable = stopping.Stoppable(file)
    with stoppable.saving(run):
        yield stoppable


def test_what_killed_saves_of_this_run_left_is_removed(restored_signals, run, tmp_path):
    run.options["pretrained_model"] = str(tmp_path / "link")
    kept = ["other.pth.tmp1", "ssd.pth.tmp1", "ssdlite.pth", "ssdlite.pth.tmp2", "ssdlite_mine.pth.tmp1"]
    for name in (*kept, "ssdlite.pth.tmp1", "ssdlite_best.pth.tmp22_1"):
        (tmp_path / name).touch()
    (tmp_path / "link").symlink_to("ssdlite.pth.tmp2")
    with saving(run, tmp_path / "ssdlite.pth"):
        assert sorted(os.listdir(tmp_path)) == sorted([*kept, "link", "ssdlite.lock"])


def test_without_a_lock_nothing_is_removed(restored_signals, run, tmp_path, monkeypatch):
    monkeypatch.setattr(stopping, "fcntl", None)
    (tmp_path / "ssdlite.pth.tmp1").touch()  # another run may be saving
    with saving(run, tmp_path / "ssdlite.pth"):
        assert os.listdir(tmp_path) == ["ssdlite.pth.tmp1"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_waits_for_the_step_then_the_run_is_saved(restored_signals, run, tmp_path, number, capfd):
    file = tmp_path / "ssdlite.pth"
    signal.signal(number, signal.SIG_DFL)
    with pytest.raises(SystemExit) as end, saving(run, file) as stoppable:
        stoppable.after_step(None)
        os.kill(os.getpid(), number)
        run.samples_seen += 4
        assert not file.exists()
        stoppable.after_step(None)
        raise AssertionError("the run goes on")
    assert end.value.code == 128 + number
    assert torch.load(file, weights_only=True)["samples_seen"] == 12
    assert f"stopped; saved {file}" in capfd.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_what_nohup_or_a_shell_in_the_background_ignores_stays_ignored(restored_signals, run, tmp_path, number):
    signal.signal(number, signal.SIG_IGN)
    with saving(run, tmp_path / "ssdlite.pth") as stoppable:
        os.kill(os.getpid(), number)
        stoppable.after_step(None)
        assert stoppable.signals == []


@pytest.mark.parametrize("error", [UnreadableImage("a.jpg"), OSError(28, "No space left on device")])
def test_steps_before_an_error_of_a_file_are_saved(restored_signals, run, tmp_path, error):
    file = tmp_path / "ssdlite.pth"
    with pytest.raises(type(error)), saving(run, file) as stoppable:
        stoppable.after_step(None)
        raise error
    assert torch.load(file, weights_only=True)["samples_seen"] == 8


@pytest.mark.parametrize("error", [UserError("loss not finite"), ValueError("a bug")])
def test_an_error_of_another_kind_saves_nothing(restored_signals, run, tmp_path, error):
    file = tmp_path / "ssdlite.pth"
    with pytest.raises(type(error)), saving(run, file) as stoppable:
        stoppable.after_step(None)
        raise error
    assert not file.exists()


def test_no_worker_outlives_an_error(restored_signals, run, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise MemoryError

    monkeypatch.setattr(run, "save", fail)
    worker = multiprocessing.get_context("fork").Process(target=ignore_sigterm, daemon=True)
    with pytest.raises(MemoryError), saving(run, tmp_path / "ssdlite.pth"):
        worker.start()
        raise UnreadableImage("a.jpg")
    worker.join(20)
    assert worker.exitcode == -signal.SIGKILL


def ignore_sigterm():
    stopping.start_worker(0)
    time.sleep(60)


def test_without_fcntl_and_unixs_signals_a_line_says_that_there_is_no_lock(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    for name in ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGCHLD"):
        monkeypatch.delattr(signal, name)
    assert runpy.run_path(str(ROOT / "src/usage.py"))["ENDING"] == [signal.SIGINT, signal.SIGTERM]
    module = runpy.run_path(str(ROOT / "src/stopping.py"))
    assert module["take_lock"](tmp_path / "ssdlite.lock") == (False, "")
    assert "no locks on this system" in capsys.readouterr().out
    module["kill_workers"]()
