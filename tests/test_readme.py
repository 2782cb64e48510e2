"""The pages: their links lead somewhere, their commands exist and, with README=1, are run.

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
from samples import voc_image, voc_list

from demo.shapes import make_dataset

FOLDERS = ".", "demo", "demo/photos", "docs", "tests"
PAGES = [page for folder in FOLDERS for page in sorted(ROOT.glob(f"{folder}/*.md"))]
RUN = ("README.md", "docs/usage.md", "docs/how_ssd_works.md")  # docs/experiments.md quotes commands of its time
TEXT = "\n".join(re.sub(r"\\\n +", "", (ROOT / page).read_text()) for page in RUN)  # continued lines as one
BLOCKS = re.findall(r"(?m)^    (.+)$|\| `([^`]+)` \|", TEXT)  # what is indented is code, and some cells of tables
COMMANDS = [
    line.split("#")[0].strip()
    for line in map("".join, BLOCKS)
    if re.match(r"(python3?|torchrun|pip|make|docker|tensorboard|git|\.) ", line)
]
COMMANDS = list(dict.fromkeys(COMMANDS))
OURS = [c for c in COMMANDS if re.search(r"(\w+\.py|(demo|tools)\.\w+)( |$)", c)]
QUICK = "--epochs 1 --no-pretrained-backbone --batch-size 2 --num-workers 0".split()
ELSEWHERE = {
    "git": "the network",
    "pip": "the network: done by make test",
    "python3": "the network: done by make test",
    "make": "minutes: make test is what runs this, make demo trains",
    "docker": "a Docker engine",
    ".": "a shell's own",
}


def anchors(page):
    """What #fragments of a page lead to: its headings as GitHub writes them."""
    headings = re.findall(r"(?m)^#+ (.+)$", page.read_text())
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [str(page.relative_to(ROOT)) for page in PAGES])
def test_links_lead_somewhere(page):
    page = ROOT / page
    for target in re.findall(r"\[[^\]]*\]\(([^)]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


@pytest.mark.parametrize("page", [str(page.relative_to(ROOT)) for page in PAGES])
def test_a_name_that_links_to_a_file_occurs_in_it(page):
    page = ROOT / page
    for name, file in re.findall(r"\[`([\w.]+)`\]\(([^)#]+\.py)\)", page.read_text()):
        for part in name.split("."):  # Encoder.encode: both
            assert re.search(rf"\b{part}\b", (page.parent / file).read_text()), f"{name}: not in {file}"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= 9000


def test_the_line_counts_are_those_of_the_files():
    counts = re.findall(r"\[([\w/.]+\.py)\]\([^)]+\)[^|]*\| (\d+) \|", (ROOT / "README.md").read_text())
    assert len(counts) >= 14
    for file, count in counts:
        lines = len((ROOT / file).read_text().splitlines())
        assert abs(lines - int(count)) <= 5, f"{file}: {lines} lines"


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
    """As they are, but on a few images, for one epoch, with two processes instead of eight."""
    tracked = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines()
    for name in tracked:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    make_dataset(tmp_path / "my_data", train=8, val=4)
    shutil.copytree(tmp_path / "my_data" / "train2017", tmp_path / "all")
    labels = tmp_path / "my_data" / "annotations" / "instances_train2017.json"
    shutil.copy(labels, tmp_path / "all" / "_annotations.coco.json")
    for year, name in ("2007", "trainval"), ("2012", "trainval"), ("2007", "test"):
        for stem in (f"{name}1", f"{name}2"):
            voc_image(tmp_path / "VOCdevkit", year, stem, [("cup", 0, (11, 11, 99, 90)), ("cup", 1, (1, 1, 20, 20))])
        voc_list(tmp_path / "VOCdevkit", year, name, f"{name}1\n{name}2\n")
    (tmp_path / "folder").mkdir()
    for photo in ("a.jpg", "your_photo.jpg", "folder/a.jpg"):
        shutil.copy(next((tmp_path / "my_data" / "val2017").iterdir()), tmp_path / photo)
    draw = [sys.executable, "-m", "demo.video", "--output", "a.avi"]
    subprocess.run(draw, cwd=tmp_path, env=ENV, check=True)
    (tmp_path / "a.avi").rename(tmp_path / "a.mp4")  # OpenCV looks into it, not at its name
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for command in COMMANDS:
        words = shlex.split(command.replace("/coco", "my_data"))
        camera = words[-2:] == ["--input", "0"]
        published = {"ssd_resnet50.pth", "mb2-ssd-lite-mp-0_686.pth", "nvidia_ssdpyt_amp_200703.pt"} & set(words)
        if words[0] in ELSEWHERE or camera or published:
            why = "a camera" if camera else "published weights" if published else ELSEWHERE[words[0]]
            print(f"NOT RUN  {command}  ({why})")
            continue
        if "train.py" in words:  # from the start: a finished run would have nothing to do
            if "--save-folder" not in words:
                model = words[words.index("--model") + 1] if "--model" in words else "ssd"
                (tmp_path / "trained_models" / f"{model}.pth").unlink(missing_ok=True)
            words += QUICK
            if "--pretrained-model" not in words:  # --freeze is for trained weights
                words = [word for word in words if word != "--freeze"]
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
