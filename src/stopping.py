"""How a run gets on with the world: the lock on its folder, the signals that stop it, its workers."""

import contextlib
import fcntl
import multiprocessing
import os
import signal
import socket
import sys
from pathlib import Path

import cv2

from src import distributed, usage
from src.distributed import print_rank0
from src.usage import UserError


def lock_save_folder(folder, model):
    """UserError, in every process, if another run trains `model` into this folder."""
    holder = ""
    if distributed.rank() == 0:
        holder = lock(Path(folder) / f"{model}.lock")
    if distributed.all_reduce([float(bool(holder))])[0]:
        if not holder:
            sys.exit(2)  # rank 0 says why
        raise UserError(f"--save-folder {folder}: in use by {holder}; give each run its own")


def lock(file):
    """Let no other run hold lock `file` until this process ends; returns who holds it, or ""."""
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)  # never closed
        # A POSIX lock: released when the process dies; forked workers do not inherit it.
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return os.read(descriptor, 999).decode(errors="replace") or "another run"
    except OSError as error:  # another user's file, or a network file system without locks
        print_rank0(f"{file}: no lock ({error.strerror}); make sure that no other run uses this folder")
        return ""
    os.truncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
    return ""


def stop_on_signals():
    """Return a list that fills with the signals which ask to stop.

    Ctrl-C, SIGTERM, SIGHUP (the terminal closes), SIGUSR1 and SIGUSR2 (clusters before their time
    limit) wait for the current step; a second Ctrl-C leaves at once. What `nohup` ignores stays ignored.
    """
    received = []

    def note(number, frame):
        received.append(number)
        with contextlib.suppress(OSError):  # the terminal may be gone
            os.write(2, b"\nfinishing the step, then saving; a second Ctrl-C leaves at once\n")
        usage.handle_signals(signal.SIG_DFL, [signal.SIGINT])

    usage.handle_signals(note)
    return received


def told_to_stop(received):
    """True if any process got a stop signal. Collective: call it at the same step in every process."""
    return distributed.all_reduce([float(bool(received))])[0] > 0


def leave(file, received):
    """End a run that was saved to `file`, with the status of a process that a signal has stopped."""
    print_rank0(saved_to(file))
    distributed.tear_down()
    sys.exit(128 + (received or [signal.SIGTERM])[0])


def stop_at_once(file, received):
    """From now on a signal ends this process at once, as does one already received: all is saved in `file`."""

    def stop(number, frame=None):
        if distributed.rank() == 0:
            with contextlib.suppress(OSError):  # the terminal may be gone
                os.write(1, f"{saved_to(file)}\n".encode(errors="backslashreplace"))
        kill_workers()
        os._exit(128 + number)  # Python's exit would wait for the other processes

    usage.handle_signals(stop)
    if received:
        stop(received[0])


def saved_to(file):
    """What a stopped run says last."""
    return f"stopped; saved {file}, the same command resumes from there"


def start_worker(worker):
    """In a loading process: one thread, and signals are left to the training process."""
    cv2.setNumThreads(1)
    for number in usage.ENDING:
        signal.signal(number, signal.SIG_IGN)


def kill_workers():
    """At exit after an error: Python would wait for ever for workers that ignore SIGTERM."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler takes a killed worker for a crash
    for worker in multiprocessing.active_children():
        worker.kill()
