"""README.md: its links lead somewhere, its commands exist and, with README=1, are run.

README=1 python -m pytest -s tests/test_readme.py
"""

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from runs import ENV, ROOT

from demo.shapes import make_dataset

TEXT = re.sub(r"\\\n +", "", (ROOT / "README.md").read_text())  # continued lines as one
BLOCKS = "\n".join(re.findall(r"(?m)^    (.+)$", TEXT))  # what is indented is code
COMMANDS = [
    line.split("#")[0].strip()
    for line in BLOCKS.splitlines()
    if re.match(r"(python3?|torchrun|pip|make|docker|tensorboard|git|\.) ", line)
]
OURS = [c for c in COMMANDS if re.search(r"(\w+\.py|(demo|tools)\.\w+)( |$)", c)]
QUICK = "--epochs 1 --multistep 1 --no-pretrained-backbone --batch-size 2 --num-workers 0".split()
ELSEWHERE = {
    "git": "the network",
    "pip": "the network: done by make test",
    "python3": "the network: done by make test",
    "make": "minutes: make test is what runs this, make demo trains",
    "docker": "a Docker engine",
    ".": "a shell's own",
}


def test_links_lead_to_files_and_to_the_lines_that_they_name():
    links = re.findall(r"\[([^\]]*)\]\(([^)]+)\)", TEXT)
    links = [(text, target) for text, target in links if not target.startswith("http")]
    assert len(links) > 20
    for text, target in links:
        if target.startswith("#"):
            assert f"## {target[1:].replace('-', ' ')}" in TEXT.lower(), target
            continue
        path, _, line = target.partition("#L")
        assert (ROOT / path).exists(), target
        if line:  # "`Encoder.encode`" stands on a line that says encode
            lines = (ROOT / path).read_text().splitlines()
            name = text.strip("`").split(".")[-1]
            where = [n for n, code in enumerate(lines, 1) if re.search(rf"\b{name}\b", code)]
            assert int(line) in where, f"{target}: {name} stands on lines {where}"


def test_there_are_commands():
    assert len(OURS) >= 10
    scripts = {"train.py", "test_dataset.py", "test_image.py", "test_video.py", "export.py"}
    scripts |= {"demo.figures", "demo.shapes"}
    assert scripts <= {word for command in OURS for word in command.split()}


@pytest.mark.parametrize("command", OURS)
def test_options_are_those_of_the_script(command, monkeypatch, capsys):
    words = shlex.split(command)
    start = next(n for n, w in enumerate(words) if re.fullmatch(r"\w+\.py|(demo|tools)\.\w+", w))
    options = {word for word in words[start:] if word.startswith("--")}
    monkeypatch.setattr(sys, "argv", [words[start], "--help"])
    monkeypatch.delitem(sys.modules, words[start], raising=False)  # or runpy warns
    with pytest.raises(SystemExit):
        if words[start - 1] == "-m":
            runpy.run_module(words[start], run_name="__main__")
        else:
            runpy.run_path(str(ROOT / words[start]), run_name="__main__")
    assert options <= set(re.findall(r"--[a-z-]+", capsys.readouterr().out))


@pytest.mark.skipif("README" not in os.environ, reason="README=1 runs them: some minutes")
def test_commands_run_one_after_the_other(tmp_path):
    """As they stand, but on a few pictures, for an epoch, with two processes for eight."""
    tracked = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines()
    for name in tracked:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    make_dataset(tmp_path / "my_data", train=8, val=4)
    for photo in ("a.jpg", "your_photo.jpg"):
        shutil.copy(next((tmp_path / "my_data" / "val2017").iterdir()), tmp_path / photo)
    draw = [sys.executable, "-m", "demo.video", "--output", "a.avi"]
    subprocess.run(draw, cwd=tmp_path, env=ENV, check=True)
    (tmp_path / "a.avi").rename(tmp_path / "a.mp4")  # OpenCV looks into it, not at its name
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for command in COMMANDS:
        words = shlex.split(command.replace("/coco", "my_data"))
        camera = words[-2:] == ["--input", "0"]
        if words[0] in ELSEWHERE or camera:
            print(f"NOT RUN  {command}  ({'a camera' if camera else ELSEWHERE[words[0]]})")
            continue
        if "train.py" in words:  # from the start: a finished run would have nothing to do
            model = words[words.index("--model") + 1] if "--model" in words else "ssd"
            (tmp_path / "trained_models" / f"{model}.pth").unlink(missing_ok=True)
            words += QUICK
        small = {"--nproc_per_node=8": "--nproc_per_node=2", "--nnodes=2": "--nnodes=1"}
        words = [small.get(word, word) for word in words]
        words = [word.replace("HOST:29500", "localhost:29533") for word in words]
        if "demo.shapes" in words:
            words += ["--train", "4", "--val", "2"]
        if words[0] == "tensorboard":
            words.append("--inspect")
        run = subprocess.run(words, cwd=tmp_path, env=ENV | {"PATH": path}, capture_output=True, text=True)
        assert run.returncode == 0, f"{shlex.join(words)}\n{run.stdout}{run.stderr}"
        assert "resuming from" not in run.stdout
        print(f"RAN      {command}")
    assert all((tmp_path / name).exists() for name in ("b.jpg", "b.mp4", "ssdlite.onnx"))
