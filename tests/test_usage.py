"""src.usage: options, and what a user sees of a mistake."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from runs import ROOT
from torch.utils.data import DataLoader, Dataset

from src import usage
from src.usage import UserError


def parser():
    p = usage.ArgumentParser(prog="prog")
    p.add_argument("--save-folder", default="x")
    p.add_argument("--input", nargs="+")
    p.add_argument("--no-pretrained-backbone", action="store_true")
    p.add_argument("--batch-size", type=usage.number(int, 1))
    p.add_argument("--share", type=usage.number(float, 0, 1))
    p.add_argument("folder", nargs="?")
    return p


def test_underscores_are_as_good_as_hyphens():
    for spelt in (["--save_folder", "a_b"], ["--save_folder=a_b"], ["--save-folder", "a_b"]):
        assert parser().parse_args(spelt).save_folder == "a_b"
    assert parser().parse_args(["--no_pretrained_backbone"]).no_pretrained_backbone
    assert parser().parse_args(["--no-pretrained_backbone"]).no_pretrained_backbone


def test_values_keep_their_underscores():
    args = parser().parse_args(["my_data", "--input", "a_b.jpg", "c_d=e_f", "_g", "--save-folder=p_q=r_s"])
    assert args.folder == "my_data" and args.save_folder == "p_q=r_s"
    assert args.input == ["a_b.jpg", "c_d=e_f", "_g"]


def test_the_command_line_is_the_default(monkeypatch):
    monkeypatch.setattr("sys.argv", ["prog", "--batch_size", "7"])
    assert parser().parse_args().batch_size == 7


def refused(arguments, capsys):
    """What standard error says of a command line that must be refused."""
    with pytest.raises(SystemExit) as stop:
        parser().parse_args(arguments)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == ""
    assert len(err.splitlines()) == 1, err
    return err


@pytest.mark.parametrize(
    "option, value",
    [("--batch-size", v) for v in ("0", "-1", "1.5", "nan", "inf", "four", "", "1e2")]
    + [("--batch-size", "1" + "0" * 400), ("--batch-size", "1" * 5000)]
    + [("--share", v) for v in ("-0.01", "1.01", "nan", "NaN", "inf", "-inf", "half", "")],
)
def test_numbers_out_of_bounds_take_one_line(capsys, option, value):
    err = refused([f"{option}={value}"], capsys)
    assert option in err and value in err and "--help" in err


def test_numbers_within_bounds_are_numbers():
    args = parser().parse_args(["--batch_size", "1", "--share", "0"])
    assert (args.batch_size, args.share) == (1, 0.0) and type(args.batch_size) is int
    assert parser().parse_args(["--share", "1"]).share == 1.0
    assert usage.number(float, 0)("2.6e-3") == 2.6e-3
    assert usage.number(int, 0)("1000000000") == 10**9


def test_the_bounds_are_told(capsys):
    assert "at least 1" in refused(["--batch-size", "0"], capsys)
    assert "between 0 and 1" in refused(["--share", "2"], capsys)


def test_unknown_option_and_missing_value_take_one_line(capsys):
    assert "--color" in refused(["--color", "red"], capsys)
    assert "--save-folder" in refused(["--save_folder"], capsys)


# run


def answer(main, capsys):
    """Standard error of a `main` that must end with status 2."""
    with pytest.raises(SystemExit) as stop:
        usage.run(main)
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    return err


def test_a_users_error_is_one_line_and_status_2(capsys):
    def main():
        raise UserError("a.jpg: no such\npicture")

    assert answer(main, capsys) == "error: a.jpg: no such picture\n"


class Broken(Dataset):
    """A data set of which one image cannot be read."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        if index == 2:
            try:
                raise ValueError("the cause")
            except ValueError as error:
                raise UserError("c.jpg: cannot be read (cut off): restore it") from error
        return index


@pytest.mark.parametrize("workers", [0, 1])
def test_a_users_error_in_a_loaders_worker_is_the_same_line(capfd, workers):
    loader = DataLoader(Broken(), num_workers=workers)
    assert answer(lambda: list(loader), capfd) == "error: c.jpg: cannot be read (cut off): restore it\n"


def test_a_full_disk_is_one_line_and_status_2(capsys):
    def main():
        open("/dev/full", "w").write("x" * 10**6)

    if not Path("/dev/full").exists():
        pytest.skip("only Linux has a disk that is always full")
    err = answer(main, capsys)
    assert "No space left on device" in err and "make room" in err and err.count("\n") == 1


@pytest.mark.parametrize("error", [ValueError("ours"), KeyError("ours"), SystemExit(130), OSError(errno.EIO, "I/O")])
def test_other_exceptions_pass_through(capsys, error):
    def main():
        raise error

    with pytest.raises(type(error)) as passed:
        usage.run(main)
    assert passed.value is error and capsys.readouterr().err == ""


def test_a_main_that_ends_well_says_nothing(capsys):
    done = []
    assert usage.run(lambda: done.append(1)) is None
    assert done == [1] and capsys.readouterr() == ("", "")


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENAMETOOLONG, errno.EROFS])
def test_a_file_that_the_system_refuses_is_one_line_and_status_2(capsys, number):
    def main():
        raise OSError(number, os.strerror(number), "some/file")

    err = answer(main, capsys)
    assert err.startswith(f"error: some/file: {os.strerror(number)}; ") and err.count("\n") == 1


@pytest.mark.parametrize(
    "message",
    [  # torch's, of several versions
        "Caught RuntimeError in DataLoader worker process 0.\nRuntimeError: unable to allocate shared memory(shm)"
        " for file </torch_6864_2028367540_0>: No space left on device (28)",
        "unable to write to file </torch_33_1>: No space left on device (28)",
        "unable to allocate shared memory(shm) for file </torch_7_8>: Success (0)",
        "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are"
        " out of shared memory. Please try to raise your shared memory limit.",
    ],
)
def test_too_little_shared_memory_is_one_line_with_both_remedies(capsys, message):
    def main():
        raise RuntimeError(message)

    err = answer(main, capsys)
    assert "--ipc=host" in err and "--num-workers 0" in err and err.count("\n") == 1


def test_a_parser_is_described_by_the_first_line_of_a_docstring_that_there_may_not_be():
    assert "one\n" in usage.ArgumentParser(description="one\n\ntwo").format_help()
    assert "two" not in usage.ArgumentParser(description="one\n\ntwo").format_help()
    assert "--help" in usage.ArgumentParser(description=None).format_help()  # python -OO


# prepare_output, prepare_outputs


def test_prepare_output_makes_the_folder_and_no_file(tmp_path):
    usage.prepare_output("--output", tmp_path / "new" / "a.json")
    usage.prepare_output("--output", str(tmp_path / "b.json"))
    usage.prepare_output("--output", tmp_path / "new" / "several" / "levels" / "deep" / "c.json")
    assert os.listdir(tmp_path) == ["new"] and os.listdir(tmp_path / "new") == ["several"]
    assert os.listdir(tmp_path / "new" / "several" / "levels" / "deep") == []


def test_outputs_are_apart_from_one_another_and_from_inputs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("in.txt").write_text("input")
    Path("link").symlink_to("in.txt")
    Path("dangling").symlink_to("new.txt")
    Path("folder").symlink_to(".")
    os.link("in.txt", "hard")
    for outputs in (["in.txt"], ["link"], ["hard"], ["folder/in.txt"], ["no.txt"]):
        with pytest.raises(UserError, match=f"--json {outputs[0]}: is an input"):
            usage.prepare_outputs([("--json", path) for path in outputs], ["in.txt", "no.txt"])
    for path in ("new.txt", "./new.txt", "folder/new.txt", "dangling", str(tmp_path / "new.txt")):
        with pytest.raises(UserError, match="is what --output writes"):
            usage.prepare_outputs([("--output", "new.txt"), ("--json", path)], ["in.txt"])
    usage.prepare_outputs([("--output", "new/a.txt"), ("--json", "b.txt")], ["in.txt"])
    assert Path("in.txt").read_text() == "input" and Path("new").is_dir()


def test_prepare_output_keeps_an_old_file(tmp_path):
    (tmp_path / "a.json").write_text("old")
    usage.prepare_output("--output", tmp_path / "a.json")
    assert (tmp_path / "a.json").read_text() == "old"


def test_prepare_output_refuses_what_cannot_be_a_file(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    for path in ("folder", "file/a.json", "file/deeper/a.json", "x" * 300 + "/a.json"):
        with pytest.raises(UserError) as error:
            usage.prepare_output("--json", tmp_path / path)
        assert str(error.value).startswith(f"--json {tmp_path / path}")
    with pytest.raises(UserError, match="is a folder"):
        usage.prepare_output("--json", f"{tmp_path}/new/")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_prepare_output_refuses_what_is_read_only(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    (tmp_path / "a.json").write_text("")
    (tmp_path / "a.json").chmod(0o400)
    tmp_path.chmod(0o500)
    try:
        for name in ("a.json", "b.json", "new/c.json"):
            with pytest.raises(UserError, match=name):
                usage.prepare_output("--json", tmp_path / name)
    finally:
        tmp_path.chmod(0o700)


# A lost standard output or error

TALK = """
import sys
from tqdm import tqdm
from src import usage

def main():
    for n in tqdm(range(3), mininterval=0):
        print("some text" * 10**5, flush=True)
    print("unflushed")
    open(sys.argv[1], "w").write("done")

usage.run(main)
"""


@pytest.mark.parametrize("lost", [["stdout"], ["stdout", "stderr"]])
def test_a_reader_that_ends_does_not_end_a_script(tmp_path, lost):
    reader, writer = os.pipe()
    os.close(reader)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | dict.fromkeys(lost, writer)
    command = [sys.executable, "-c", TALK, tmp_path / "file"]
    done = subprocess.run(command, cwd=ROOT, **streams)
    os.close(writer)
    assert done.returncode == 0 and (tmp_path / "file").read_text() == "done"
    assert done.stderr is None or b"Error" not in done.stderr


@pytest.mark.parametrize("unbuffered", [False, True])
def test_a_line_on_standard_error_survives_a_sudden_end(unbuffered):
    # With PYTHONUNBUFFERED as without: a warning before the kernel kills the process, say.
    code = "import os, sys; from src import usage\n"
    code += "usage.run(lambda: (print('told', file=sys.stderr), os._exit(7)))"
    environment = os.environ | {"PYTHONUNBUFFERED": "1" if unbuffered else ""}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True)
    assert done.returncode == 7 and done.stderr == b"told\n"


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("times", [1, 10**5])  # a line, which is written as the script ends; more than a buffer holds
def test_a_full_disk_under_standard_output_is_one_line_and_status_2(times, unbuffered):
    if not Path("/dev/full").exists():
        pytest.skip("only Linux has a disk that is always full")
    code = f"from src import usage; usage.run(lambda: print({times} * 'some text'))"
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    command = [sys.executable, "-c", code]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=full, stderr=subprocess.PIPE)
        untold = subprocess.run(command, cwd=ROOT, env=environment, stdout=full, stderr=full)
    assert done.returncode == untold.returncode == 2
    assert b"No space left" in done.stderr and done.stderr.count(b"\n") == 1


@pytest.mark.parametrize("encoding", ["ascii", "utf-8", "iso8859-1", "utf-8:strict"])
def test_what_a_terminal_cannot_show_is_escaped(encoding):
    code = r"import sys; from src import usage; text = 'é \udce9 \ud83d 人';"
    code += "usage.run(lambda: print(text) or print(text, file=sys.stderr))"
    env = os.environ | {"PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True)
    assert done.returncode == 0 and rb"\udce9 \ud83d" in done.stdout and rb"\udce9 \ud83d" in done.stderr


def test_streams_stay_what_they_were(tmp_path):
    code = "import sys; from src import usage; usage.run(lambda: print('é', sys.stdout.encoding))"
    for encoding in ("utf-8", "iso8859-1"):
        env = os.environ | {"PYTHONIOENCODING": encoding}
        said = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, env=env)
        assert said.decode(encoding).split() == ["é", encoding]
