"""Ending a run early without losing a step: signals, broken images, workers; and a lock on its checkpoint."""

import contextlib
import multiprocessing
import os
import re
import signal
import socket
import sys

import cv2

from src import distributed, usage
from src.distributed import is_main_process, print_rank0
from src.usage import UnreadableImage, UserError

try:
    import fcntl
except ModuleNotFoundError:  # not Unix
    fcntl = None


class Stoppable:
    """Ends a run's loop early without losing a step.

    Ctrl-C, SIGTERM, SIGHUP (the terminal closes), SIGUSR1 and SIGUSR2 (clusters before their time
    limit) wait for the current step; a second Ctrl-C ends the run at once. What `nohup` ignores stays
    ignored. An image that cannot be read or a full disk ends it at once; the last step is saved, too.
    """

    def __init__(self, file):
        """file (Path): the run's checkpoint; UserError, in every process, if another run has it. Collective."""
        self.has_lock = lock_checkpoint(file)
        self.file = file
        self.run = None
        self.signals = []  # received and not yet obeyed

    @contextlib.contextmanager
    def saving(self, run):
        """Around the loop: `run` is what is saved. Collective: first, what killed saves left is removed."""
        self.run = run
        if self.has_lock:
            remove_leftovers(self.file, run.options.get("pretrained_model"))
        distributed.barrier()  # only then may another process save
        usage.handle_signals(self.note)
        try:
            yield
        except (UnreadableImage, OSError):
            # The process that met it saves: parameters are equal in all, only batch norm's running statistics differ.
            run.save(self.file, rank=distributed.rank())
            raise
        finally:
            kill_workers()

    def after_step(self, logged):
        """Save and exit if any process received a signal. Collective, with the same `logged` in all processes."""
        # CUDA is asynchronous; waiting for it after every step would stall it, so processes agree only when logging.
        on_gpu = next(self.run.network.parameters()).is_cuda
        if on_gpu and distributed.world_size() > 1 and not logged:
            return
        if distributed.all_reduce([float(bool(self.signals))])[0]:
            self.run.save(self.file)
            print_rank0(self.farewell())
            distributed.tear_down()
            sys.exit(128 + (self.signals or [signal.SIGTERM])[0])

    @contextlib.contextmanager
    def evaluation(self):
        """Within it a signal ends the process at once: the run has just been saved, and an evaluation takes long.

        torchrun and clusters kill a process half a minute after the signal.
        """
        usage.handle_signals(self.exit_now)
        if self.signals:
            self.exit_now(self.signals[0])
        yield
        distributed.barrier()  # all in time for the next signal
        usage.handle_signals(self.note)

    def note(self, number, frame):
        """Handle a signal: remember it."""
        self.signals.append(number)
        with contextlib.suppress(OSError):  # the terminal may be gone
            os.write(2, b"\nfinishing the step, then saving; press Ctrl-C again to quit at once\n")
        usage.handle_signals(signal.SIG_DFL, [signal.SIGINT])

    def exit_now(self, number, frame=None):
        """Handle a signal: end this process, whatever the others do."""
        if is_main_process():
            with contextlib.suppress(OSError):  # the terminal may be gone
                os.write(1, f"{self.farewell()}\n".encode(errors="backslashreplace"))
        kill_workers()
        os._exit(128 + number)  # Python's exit would wait for the other processes

    def farewell(self):
        """What a stopped run prints last."""
        return f"stopped; saved {self.file}, the same command resumes from there"


def lock_checkpoint(file):
    """Let no other run write the checkpoint `file` (Path); UserError, in every process, if one does.

    True in the process that holds the lock from now on.
    """
    has_lock = False
    holder = ""
    if is_main_process():
        has_lock, holder = take_lock(file.with_suffix(".lock"))
    if distributed.all_reduce([float(bool(holder))])[0]:
        if not holder:
            sys.exit(2)  # rank 0 says why
        raise UserError(f"--save-folder {file.parent}: in use by {holder}; give each run its own")
    return has_lock


def take_lock(file):
    """Try to hold lock `file` until this process ends.

    Returns whether it does, and who else holds it ("": nobody, or that cannot be known).
    """
    if fcntl is None:
        print_rank0(f"{file}: no locks on this system; make sure that no other run writes here")
        return False, ""
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)  # never closed
        # A POSIX lock: released when the process dies; forked workers do not inherit it.
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False, os.read(descriptor, 999).decode(errors="replace") or "another run"
    except OSError as error:  # another user's file, or a network file system without locks
        print_rank0(f"{file}: no lock ({error.strerror}); make sure that no other run writes here")
        return False, ""
    os.truncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
    return True, ""


def remove_leftovers(file, pretrained_model):
    """Delete temporary files of processes that were killed while saving checkpoint `file`, or the best one.

    The file that training starts from is kept.
    """
    with contextlib.suppress(OSError):  # the folder cannot be listed
        for leftover in file.parent.iterdir():
            is_ours = re.fullmatch(rf"{file.stem}(_best)?\.pth\.tmp[0-9_]+", leftover.name)
            if is_ours and usage.file_key(leftover) != usage.file_key(pretrained_model or ""):
                with contextlib.suppress(OSError):  # another user's
                    leftover.unlink()


def start_worker(worker):
    """In a loading process: one thread, and signals are left to the training process."""
    cv2.setNumThreads(1)
    for number in usage.ENDING:
        signal.signal(number, signal.SIG_IGN)


def kill_workers():
    """At its exit after an error, Python would wait for ever for workers that ignore SIGTERM."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler takes a killed worker for a crash
    for worker in multiprocessing.active_children():
        worker.kill()
