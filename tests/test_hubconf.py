"""hubconf.py: torch.hub loads the detector and the networks, from any folder."""

import runpy
import subprocess
import sys

import pytest
import torch
from runs import ENV, ROOT

from src.model import MODELS

PROGRAM = """
import sys, numpy, torch
detector = torch.hub.load(sys.argv[1], "ssdlite_voc", source="local", device="cpu")
(found,) = detector([numpy.zeros((40, 60, 3), numpy.uint8)], score_threshold=0.0)
print(len(detector.classes), detector.classes[15], tuple(found["boxes"].shape))
"""


def test_the_detector_from_another_folder(tmp_path):
    command = [sys.executable, "-c", PROGRAM, str(ROOT)]
    done = subprocess.run(command, cwd=tmp_path, env=ENV, capture_output=True, text=True, timeout=120)
    assert done.stdout == "21 person (200, 4)\n", done.stderr


@pytest.mark.parametrize("name", ["ssd", "ssdlite"])
def test_networks_for_any_number_of_classes(name):
    network = torch.hub.load(ROOT, name, 5, source="local", pretrained_backbone=False)
    assert type(network) is MODELS[name] and network.num_classes == 5


def test_nothing_else_is_an_entry_point():
    names = runpy.run_path(str(ROOT / "hubconf.py"))
    listed = {name for name, value in names.items() if callable(value) and not name.startswith("_")}
    assert listed == {"ssd", "ssdlite", "ssdlite_voc"}  # as torch.hub.list
