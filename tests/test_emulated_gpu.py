"""tests/test_gpu.py and the scripts with --amp on an emulated GPU, where ../shared has an emulator.

    GPU_EMULATOR=1 python -m pytest -s tests/test_emulated_gpu.py

Torch's host code for CUDA is the real one, arithmetic is done on the CPU in the GPU's dtypes: devices, float16,
GradScaler, waits and memory are tested, not cuDNN, NCCL or speed.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import ENV, ROOT

from src.detector import Detector
from src.images import read_image

EMULATOR = ROOT.parent / "shared/tools/cuda-emulator/emulate"
CAN_RUN = (
    "GPU_EMULATOR" in os.environ
    and EMULATOR.exists()
    and shutil.which("gcc")
    and (torch.version.cuda or "").startswith("13.")
)
WHY = "GPU_EMULATOR=1 runs it, 20 minutes in all; needs the emulator in ../shared, gcc, and torch with CUDA 13"
pytestmark = pytest.mark.skipif(not CAN_RUN, reason=WHY)


def emulate(*command, **env):
    """What a Python command prints, run to its end on the emulator."""
    env = ENV | {"OMP_WAIT_POLICY": "PASSIVE"} | env
    del env["CUDA_VISIBLE_DEVICES"]
    host = ["--host"] if command[0] == "--host" else []  # without arithmetic: fast, results are meaningless
    command = [EMULATOR, *host, sys.executable, *command[len(host) :]]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, env=env, stdout=-1, stderr=subprocess.STDOUT, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_test_image_finds_what_a_cpu_finds(tmp_path):
    run = (
        "import runpy, torch\nassert torch.cuda.is_available()\nrunpy.run_path('test_image.py', run_name='__main__')\n"
    )
    (tmp_path / "run.py").write_text(run)
    options = ["--amp", "--pretrained-model", "demo/ssdlite_shapes.pth", "--cls-threshold", 0.23]  # no score is near it
    options += ["--input", "demo/pictures", "--output", tmp_path, "--json", tmp_path / "found.json"]
    emulate(tmp_path / "run.py", *options)
    images = json.loads((tmp_path / "found.json").read_text())["images"]
    detector = Detector.load(ROOT / "demo/ssdlite_shapes.pth", "cpu")
    assert len(images) == 3
    for image in images:
        (expected,) = detector([read_image(ROOT / image["file"])], score_threshold=0.23)
        found = image["detections"]
        assert [one["label"] for one in found] == [detector.classes[k] for k in expected["labels"]]
        np.testing.assert_allclose([one["score"] for one in found], expected["scores"], atol=0.01)
        np.testing.assert_allclose([one["box"] for one in found], expected["boxes"], atol=2)


def gpu_tests(chosen, folder, devices):
    """Run the tests of tests/test_gpu.py that -k chooses; none of them may be skipped."""
    # torchrun, and our tests, start this in place of Python.
    (folder / "python").write_text(f'#!/bin/sh\n[ "$1" = -u ] && shift\nexec {EMULATOR} {sys.executable} "$@"\n')
    (folder / "python").chmod(0o755)
    env = {"PYTHON_EXEC": str(folder / "python"), "SHIM_DEVICES": str(devices)}
    # --tb=native: pytest's own would print tensors, outside the emulator, where they cannot be read.
    options = "-s -rs --tb=native --durations=0 tests/test_gpu.py".split()
    said = emulate("-m", "pytest", *options, "-k", chosen, **env)
    assert " passed" in said and "SKIPPED" not in said


def test_gpu_tests_on_one_device(tmp_path):
    # Training memory and torchrun: see below. SSD's 60 steps would take ten minutes, ssdlite's show the same.
    gpu_tests("not memory_of_training and not all_gpus and not two_gpus and not overflows[ssd]", tmp_path, 1)


def test_torchrun_on_two_devices(tmp_path):
    # Not two_gpus: every emulated rank gets its own tensors back as the sum.
    gpu_tests("all_gpus", tmp_path, 2)


def test_memory_of_training():
    pytest_script = Path(sys.executable).with_name("pytest")
    assert "2 passed" in emulate("--host", pytest_script, "-s", "tests/test_gpu.py", "-k", "memory_of_training")


def test_benchmark(tmp_path):
    # A float16 matrix product takes a CPU minutes. EMU_TWICE=0: torch's host code for a gradient through a mask
    # would read how long it is from a device that has not computed it.
    (tmp_path / "run.py").write_text(
        "from tools import benchmark\nbenchmark.peak = lambda *_: 1e12\nbenchmark.main()\n"
    )
    said = emulate(tmp_path / "run.py", "--amp", "--repeats", 1, "--images", 1, EMU_TWICE="0")
    assert said.startswith("cuda, ") and "NHWC" in said and "validation" in said
