"""Imports within the project go down only, as the design has it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# What each module of src may import from src, beside usage, which everyone may.
FOUNDATIONS = set("boxes loss transform distributed visualize images annotations classes voc_metric".split())
BELOW = {name: set() for name in (*FOUNDATIONS, "usage")}
BELOW["model"] = {"boxes"}
BELOW["stopping"] = {"distributed"}
BELOW["dataset"] = BELOW["checkpoint"] = FOUNDATIONS | {"model"}
BELOW["log"] = FOUNDATIONS | {"detector", "engine"}
BELOW["detector"] = BELOW["engine"] = FOUNDATIONS | {"model", "dataset", "checkpoint"}

MODULES = sorted(path.stem for path in ROOT.glob("src/*.py") if path.stem != "__init__")
SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py"))


def imported(path):
    """Dotted names of all that a file imports, wherever in it; `from a import b` is a.b."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            # The package of a relative import is src, where the dots stand.
            module = ".".join(filter(None, ["src" if node.level else "", node.module]))
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def from_src(path):
    """Modules of src that a file imports; "*" or the package itself counts under its own name."""
    parts = [name.split(".") for name in imported(path)]
    return {(name + ["src"])[1] for name in parts if name[0] == "src"}


def test_there_are_modules_and_scripts_to_look_at():
    assert {"boxes", "model", "detector"} <= set(MODULES)
    assert {"train", "test_dataset", "test_image", "test_video", "export"} <= set(SCRIPTS)


@pytest.mark.parametrize("module", MODULES)
def test_modules_import_only_what_lies_below(module):
    assert module in BELOW, f"src/{module}.py has no place in the order of BELOW yet"
    allowed = BELOW[module] | ({"usage"} if module != "usage" else set())
    assert from_src(ROOT / f"src/{module}.py") - allowed == set()


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_import_only_modules_of_src(script):
    assert from_src(ROOT / f"{script}.py") - set(MODULES) == set()


@pytest.mark.parametrize(
    "path", [str(p.relative_to(ROOT)) for f in ("*.py", "src/*.py", "demo/*.py", "tools/*.py") for p in ROOT.glob(f)]
)
def test_nothing_imports_a_script(path):
    assert {name.split(".")[0] for name in imported(ROOT / path)} & set(SCRIPTS) == set()


def test_the_package_file_is_empty():
    assert (ROOT / "src/__init__.py").read_text() == ""
