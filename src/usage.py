"""Command-line parsing and one-line error messages for all scripts."""

import argparse
import contextlib
import errno
import io
import math
import os
import re
import signal
import sys
import unicodedata
from pathlib import Path

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
# What a user can do about the system's errors with files that no check of ours foresaw.
REMEDIES = dict.fromkeys(DISK_FULL, "make room and start again") | {
    errno.EACCES: "change its permissions, or choose another",
    errno.EPERM: "change its permissions, or choose another",
    errno.EROFS: "choose another place",
    errno.ENAMETOOLONG: "give a shorter name",
}


class UserError(Exception):
    """A mistake that the user can fix: its message names the value and the remedy, on one line."""


class UnreadableImage(UserError):
    """An image file that cannot be used; what was computed before it was read is valid."""


class HelpFormatter(argparse.HelpFormatter):
    """argparse's, but it states the default where there is one."""

    def _get_help_string(self, action):
        unstated = action.default is None or action.default is False or action.default == argparse.SUPPRESS
        return action.help + ("" if unstated else " (default: %(default)s)")


class ArgumentParser(argparse.ArgumentParser):
    """argparse, where `--save_folder` is as good as `--save-folder` and errors take one line."""

    def __init__(self, description=None, **settings):
        first_line = (description or "").partition("\n")[0]  # of a docstring, which `python -OO` leaves out
        super().__init__(description=first_line, formatter_class=HelpFormatter, **settings)

    def parse_args(self, args=None):
        """Parse `args` (default: the command line); exits with status 2 on a mistake."""
        args = sys.argv[1:] if args is None else args
        hyphens = []
        for arg in args:
            name, equals, value = arg.partition("=")
            hyphens.append(name.replace("_", "-") + equals + value if name[:2] == "--" else arg)
        return super().parse_args(hyphens)

    def error(self, message):
        """Print one line and exit with status 2."""
        sys.exit(complain(f"{message} (see {self.prog} --help)"))


def number(kind, low, high=math.inf):
    """Return a parser of an int or float option that must lie in [low, high]."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low <= value <= high and abs(value) < 1e18):
            bounds = f"at least {low}" if high == math.inf else f"between {low} and {high}"
            noun = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r}: give {noun} {bounds}")
        return value

    return parse


def make_folder(option, folder):
    """Make a folder that a run will write to: better an error now than after an epoch."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{option} {folder}: cannot be made ({error.strerror})") from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"{option} {folder}: may not be written to; choose another")


def prepare_output(option, path):
    """Make the folder of a file to be written, with all above it; UserError if the file cannot be written."""
    if os.path.isdir(path) or str(path).endswith(("/", os.sep)):
        raise UserError(f"{option} {path}: is a folder; give a file's name")
    folder = Path(path).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{option} {path}: cannot make its folder ({error.strerror})") from error
    if not os.access(path if os.path.exists(path) else folder, os.W_OK):
        raise UserError(f"{option} {path}: may not be written; choose another place")


def prepare_outputs(outputs, inputs):
    """Make sure that all outputs, [(option, path), ...], can be written, as prepare_output does.

    UserError if one of them is one of the inputs (paths, which need not exist), or another output.
    """
    known = {file_key(path): "an input" for path in inputs}
    for option, path in outputs:
        file = file_key(path)
        if file in known:
            raise UserError(f"{option} {path}: is {known[file]}, too; give another name")
        known[file] = f"what {option} writes"
    for option, path in outputs:
        prepare_output(option, path)


def file_key(path):
    """A key that is the same for all names of a file, which need not exist."""
    try:
        status = os.stat(path)
        return status.st_dev, status.st_ino
    except (OSError, ValueError):
        return os.path.realpath(path)


def utf8(option, path):
    """A path for what takes UTF-8 only, such as OpenCV and TensorBoard; UserError if it is in another encoding."""
    try:
        return os.fsencode(path).decode()
    except UnicodeError as error:
        raise UserError(f"{option} {path}: its name is not in UTF-8; rename it") from error


def quoted(value):
    """A value of the user's as it is to be shown: '139' is not 139, and what looks alike is escaped."""
    return repr(value) if unicodedata.is_normalized("NFC", str(value)) else ascii(value)


def is_lfs_pointer(path):
    """True for what a clone without Git LFS holds in place of a large file."""
    with open(path, "rb") as file:
        return file.read(100).startswith(b"version https://git-lfs.github.com/spec/")


# Signals that ask a script to end: Ctrl-C, kill, a closed terminal, a cluster before its time limit.
ENDING = [getattr(signal, n) for n in "SIGINT SIGTERM SIGHUP SIGUSR1 SIGUSR2".split() if hasattr(signal, n)]


def handle_signals(handler, numbers=ENDING):
    """Let `handler` take these signals, except those that are ignored, as under `nohup`."""
    for number in numbers:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


class LossyFile(io.FileIO):
    """A file that drops what nobody can read any more: its reader ended, its terminal closed.

    Another error, such as that of a full disk, is raised once: Python would repeat it as it exits.
    """

    raised = False

    def write(self, data):
        """Write bytes; returns how many are done with."""
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO) and not self.raised:
                self.raised = True
                raise
            return len(data)


def lossy(stream):
    """A text stream that writes to the same place as `stream`, into a LossyFile; what it cannot encode is escaped."""
    stream.flush()
    file = io.BufferedWriter(LossyFile(stream.fileno(), "w", closefd=False))
    by_line = stream.line_buffering or stream.write_through  # the latter: PYTHONUNBUFFERED
    return io.TextIOWrapper(file, stream.encoding, "backslashreplace", line_buffering=by_line)


def run(main):
    """Call `main`; a UserError, or a file that the system refuses, becomes one line on standard error and status 2.

    Ctrl-C, where a script does not see to it itself, ends it with status 130. A lost standard
    output or error (`| head`, a closed terminal) does not end it.
    """
    if sys.stdout is sys.__stdout__ is not None:  # neither redirected nor closed
        sys.stdout = lossy(sys.stdout)
    if sys.stderr is sys.__stderr__ is not None:
        sys.stderr = lossy(sys.stderr)
    try:
        main()
        if sys.stdout:  # not closed
            sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(130)
    except UserError as error:
        # From a loader's worker the error arrives wrapped in that worker's traceback.
        sys.exit(complain(str(error).rsplit(f"{type(error).__name__}: ", 1)[-1].strip()))
    except OSError as error:
        if error.errno not in REMEDIES or not (error.filename or error.errno in DISK_FULL):
            raise
        where = error.filename or "a disk that is written to"
        sys.exit(complain(f"{where}: {error.strerror}; {REMEDIES[error.errno]}"))
    except RuntimeError as error:  # torch's, of a loader's worker
        if not re.search(r"shared memory\(shm\) for file|torch_\w+>: No space left|signal: Bus error", str(error)):
            raise
        remedy = "use --num-workers 0, or give it more (docker run --ipc=host)"
        sys.exit(complain(f"no shared memory is left for the loading processes: {remedy}"))


def complain(message):
    """Print `message` as one line on standard error; return exit status 2."""
    with contextlib.suppress(OSError):  # its disk is full
        print("error: " + " ".join(message.split()), file=sys.stderr, flush=True)
    return 2
