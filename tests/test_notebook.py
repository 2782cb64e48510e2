"""demo/ssd_explained.ipynb runs, and what is saved in it is what it prints, on any machine."""

import itertools
import re

import nbformat
import pytest
from nbclient import NotebookClient
from runs import ROOT

NOTEBOOK = ROOT / "demo" / "ssd_explained.ipynb"
SAVED = nbformat.read(NOTEBOOK, as_version=4)
PATTERNS = r"[A-Za-z_]+", r"-?\d+\.?\d*"  # words, numbers


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(cell):
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def kinds(cell):
    """Types of a cell's outputs; text that the kernel sends in several pieces, as a busy one does, counts once."""
    return [kind for kind, _ in itertools.groupby(output.output_type for output in cell.outputs)]


def test_it_prints_and_draws_what_is_saved():
    fresh = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(fresh, timeout=300, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    for saved, new in zip(code_cells(SAVED), code_cells(fresh), strict=True):
        hint = f"run jupyter execute --inplace {NOTEBOOK.name}: {new.source}"
        assert kinds(saved) == kinds(new), hint
        words, numbers = ([re.findall(pattern, printed(cell)) for cell in (saved, new)] for pattern in PATTERNS)
        assert words[0] == words[1], hint
        # Another processor rounds otherwise.
        assert [*map(float, numbers[0])] == pytest.approx([*map(float, numbers[1])], rel=0.05, abs=0.02), hint


def test_what_is_saved_is_whole_and_small():
    outputs = [output for cell in code_cells(SAVED) for output in cell.outputs]
    assert sum("image/jpeg" in output.get("data", {}) for output in outputs) >= 7
    assert not any(output.output_type == "error" or output.get("name") == "stderr" for output in outputs)
    assert NOTEBOOK.stat().st_size < 1_500_000


def test_it_needs_nothing_of_the_drawing_scripts():
    source = "\n".join(cell.source for cell in code_cells(SAVED))
    assert set(re.findall(r"from (demo\S*)", source)) == {"demo.shapes"}
