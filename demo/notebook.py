"""Run demo/ssd_explained.ipynb from top to bottom and save what it prints and draws.

python -m demo.notebook
"""

import sys
from pathlib import Path

from src import usage

try:
    import nbformat
    from nbclient import NotebookClient
except ModuleNotFoundError:
    sys.exit(usage.complain("nbclient is missing: pip install -r requirements-dev.txt"))

NOTEBOOK = Path(__file__).parent / "ssd_explained.ipynb"


def execute(path):
    """Return the notebook with fresh outputs, and nothing in it that differs from machine to machine."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(path.parent)}},  # where Jupyter starts it
    )
    client.execute()
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook.metadata = nbformat.from_dict({"kernelspec": kernel, "language_info": {"name": "python"}})
    return notebook


def main():
    """Run it and save it."""
    nbformat.write(execute(NOTEBOOK), NOTEBOOK)


if __name__ == "__main__":
    usage.run(main)
