"""demo/ssd_explained.ipynb runs, and what is saved in it is what it prints, on any machine."""

import json
import re

import nbformat
import pytest

from demo.notebook import NOTEBOOK, execute

SAVED = nbformat.read(NOTEBOOK, as_version=4)
PATTERNS = r"[A-Za-z_]+", r"-?\d+\.?\d*"  # words, numbers


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(cell):
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


@pytest.fixture(scope="module")
def fresh():
    return execute(NOTEBOOK)  # raises where a cell does


def test_it_prints_what_is_saved(fresh):
    pairs = list(zip(code_cells(SAVED), code_cells(fresh), strict=True))
    assert len(pairs) > 5
    for saved, new in pairs:
        kinds = [[output.output_type for output in cell.outputs] for cell in (saved, new)]
        assert kinds[0] == kinds[1], f"run python -m demo.notebook: {new.source}"
        words, numbers = ([re.findall(pattern, printed(cell)) for cell in (saved, new)] for pattern in PATTERNS)
        assert words[0] == words[1], f"run python -m demo.notebook: {new.source}"
        # Another processor rounds otherwise.
        assert [*map(float, numbers[0])] == pytest.approx([*map(float, numbers[1])], rel=0.05, abs=0.02)


def test_each_figure_is_drawn(fresh):
    drawn = [o for cell in code_cells(fresh) for o in cell.outputs if o.output_type == "display_data"]
    assert len(drawn) >= 6 and all("image/jpeg" in output.data for output in drawn)


def test_saved_cells_ran_in_order_and_without_an_error():
    cells = code_cells(SAVED)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        for output in cell.outputs:
            assert output.output_type in ("stream", "display_data") and output.get("name") != "stderr"


def test_nothing_saved_tells_of_the_machine():
    assert set(SAVED.metadata) == {"kernelspec", "language_info"} and set(SAVED.metadata.language_info) == {"name"}
    assert not any(cell.metadata for cell in SAVED.cells)
    for cell in code_cells(SAVED):
        for output in cell.outputs:
            text = {kind: data for kind, data in output.get("data", {}).items() if not kind.startswith("image/")}
            said = json.dumps([output.get("text"), text, output.metadata if "metadata" in output else None])
            assert not re.search(r"(?<![\w.])(/\w+){2}|[A-Za-z]:\\", said), said


def test_it_is_small_enough_to_be_read_on_the_web():
    assert NOTEBOOK.stat().st_size < 1_500_000
