"""export.py: what ONNX Runtime finds with the file is what Detector finds with the checkpoint."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from reference.inputs import image, weights
from runs import ENV, ROOT, SHAPES, run_here
from samples import forward, mb2_ssd_lite

from src.checkpoint import VOC_CLASSES
from src.detector import Detector
from src.images import read_image
from src.model import build_model
from src.transform import normalize, resize

IMAGES = sorted((ROOT / "demo" / "pictures").glob("*.jpg"))
CLASSES = ["background"] + [f"class {k}" for k in range(1, 8)]
SIZES = [(1, 1), (2, 5), (300, 300), (20, 3000), (3000, 20), (640, 480), (251, 377), (3000, 4000)]
USAGE = (ROOT / "docs" / "usage.md").read_text().split("## Export to ONNX")[1].split("\n## ")[0]
with_ssd = pytest.mark.skipif("EXPORT_SSD" not in os.environ, reason="EXPORT_SSD=1 runs it: ssdlite shows the same")
BOTH = [pytest.param("ssd", marks=with_ssd), "ssdlite"]
onnxruntime.set_default_logger_severity(3)


def export(checkpoint, file):
    """Run export.py in this process."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert run_here(monkeypatch, "export.py", "--pretrained-model", checkpoint, "--output", file) == 0


@pytest.fixture(scope="module")
def lite(tmp_path_factory):
    """The ONNX file of the bundled detector of shapes, from the usage page's command as it is."""
    folder = tmp_path_factory.mktemp("export")
    for name in ("demo", "src", "export.py"):
        (folder / name).symlink_to(ROOT / name)
    (command,) = re.findall(r"(?m)^    python (export\.py .+)$", USAGE)
    assert command.split()[2] == str(SHAPES.relative_to(ROOT))
    settings = {"cwd": folder, "env": ENV, "check": True, "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, *command.split()], **settings)
    (file,) = folder.glob("*.onnx")
    assert done.stderr == "" and file.name in done.stdout
    return file


@pytest.fixture(scope="module", params=BOTH)
def files(request, lite, tmp_path_factory):
    """A checkpoint and its ONNX file; ssd's checkpoint has the published layout."""
    if request.param == "ssdlite":
        return SHAPES, lite
    folder = tmp_path_factory.mktemp("export")
    network = build_model("ssd", len(CLASSES), pretrained_backbone=False)
    shapes = {name: list(value.shape) for name, value in network.state_dict().items()}
    state = {name: torch.from_numpy(value) for name, value in weights(shapes).items()}
    torch.save({"model": state, "label_map": dict(enumerate(CLASSES))}, folder / "ssd.pth")
    export(folder / "ssd.pth", folder / "ssd.onnx")
    return folder / "ssd.pth", folder / "ssd.onnx"


@pytest.fixture(scope="module")
def pair(files):
    """The file's detect(image, **thresholds) -> dict of arrays, and the checkpoint's Detector."""
    checkpoint, file = files
    session = onnxruntime.InferenceSession(file)

    def detect(image, **thresholds):
        thresholds = {name: np.array(value, np.float32) for name, value in thresholds.items()}
        found = session.run(["boxes", "labels", "scores"], {"image": image} | thresholds)
        return dict(zip(("boxes", "labels", "scores"), found, strict=True))

    return detect, Detector.load(checkpoint, device="cpu")


def assert_same(found, expected, pixels, score):
    """Each of one side's detections is among the other's, but for so many pixels and so much."""
    expected = {name: value.numpy() for name, value in expected.items()}
    assert all(found[name].dtype == expected[name].dtype for name in expected)
    assert all(found[name].shape == expected[name].shape for name in expected)
    same = found["labels"][:, None] == expected["labels"]
    same &= abs(found["boxes"][:, None] - expected["boxes"]).max(axis=2, initial=0) <= pixels
    same &= abs(found["scores"][:, None] - expected["scores"]) <= score
    assert same.any(axis=0).all() and same.any(axis=1).all()
    assert (np.diff(found["scores"]) <= 0).all()


@pytest.mark.parametrize("thresholds", [(0.3, 0.5), (0.01, 0.5), (0.0, 0.5), (0.01, 0.2), (0.01, 0.8), (0.6, 0.5)])
def test_detects_what_the_detector_detects_in_the_same_pixels(pair, thresholds):
    detect, detector = pair
    total = 0
    for file in IMAGES:
        pixels = resize(read_image(file), 300)
        expected = detector([pixels], *thresholds)[0]
        found = detect(pixels, score_threshold=thresholds[0], nms_threshold=thresholds[1])
        assert_same(found, expected, pixels=0.01, score=1e-5)
        total += len(expected["scores"])
    assert total > 0


def test_the_other_sides_threshold_changes_what_is_found():
    """The test above would not see a threshold that changes nothing."""
    detector = Detector.load(SHAPES, device="cpu")
    images = [read_image(file) for file in IMAGES]
    counts = [
        sum(len(found["scores"]) for found in detector(images, *thresholds))
        for thresholds in ((0.3, 0.5), (0.01, 0.5), (0.01, 0.2), (0.01, 0.8), (0.6, 0.5))
    ]
    assert len(set(counts)) >= 4


def test_boxes_are_in_pixels_of_the_image_and_thresholds_default_to_test_images(lite):
    session = onnxruntime.InferenceSession(lite)
    detector = Detector.load(SHAPES, device="cpu")
    for file in IMAGES:
        pixels = read_image(file)
        assert pixels.shape[0] != pixels.shape[1]
        boxes, labels, scores = session.run(None, {"image": pixels})
        expected = detector([pixels], 0.3, 0.5)[0]
        found = {"boxes": boxes, "labels": labels, "scores": scores}
        assert_same(found, expected, pixels=0.5, score=1e-3)
        assert len(scores) > 0


@pytest.mark.parametrize("size", SIZES)
def test_resizes_as_the_detector_does(lite, size):
    """But for one level of 255: torch and ONNX Runtime round their weights differently."""
    model = onnx.load(lite)
    pixels = onnx.helper.make_tensor_value_info("pixels", onnx.TensorProto.UINT8, None)
    model.graph.output.append(pixels)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    (resized,) = session.run(["pixels"], {"image": noise})
    difference = abs(resized[0].astype(int) - resize(noise, 300))
    assert resized.shape == (1, 300, 300, 3)
    assert difference.max() <= 1 and (difference > 0).mean() < 0.02


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (20, 3000), (3000, 20), (640, 480), (3000, 4000)])
def test_boxes_lie_in_images_of_any_size(pair, size):
    detect, detector = pair
    pixels = cv2.resize(image(1), size[::-1], interpolation=cv2.INTER_AREA)
    height, width = size
    found = detect(pixels, score_threshold=0.01)
    boxes = found["boxes"]
    expected = detector([pixels])[0]["boxes"]
    assert len(boxes) > 0 and abs(len(boxes) - len(expected)) <= 2  # some lie at a threshold
    assert (boxes >= 0).all() and (boxes <= [width, height, width, height]).all()
    assert (boxes[:, :2] <= boxes[:, 2:]).all()


def test_a_published_ssdlite_detects_the_same(tmp_path):
    """Its pixels have another mean, which is in the file, too."""
    torch.save(mb2_ssd_lite(), tmp_path / "mb2.pth")
    export(tmp_path / "mb2.pth", tmp_path / "mb2.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "mb2.onnx")
    assert json.loads(session.get_modelmeta().custom_metadata_map["classes"]) == ["background", *VOC_CLASSES]
    boxes, labels, scores = session.run(None, {"image": image(0)})
    expected = Detector.load(tmp_path / "mb2.pth", device="cpu")([image(0)], 0.3)[0]
    for box, label, score in zip(*(expected[key][:20].numpy() for key in ("boxes", "labels", "scores")), strict=True):
        # These weights amplify rounding.
        same = (labels == label) & (abs(boxes - box).max(axis=1) < 1) & (abs(scores - score) < 0.01)
        assert same.any()


def test_nothing_found_is_empty(pair):
    found = pair[0](np.zeros((40, 30, 3), np.uint8), score_threshold=1)
    assert {name: (value.shape, value.dtype.name) for name, value in found.items()} == {
        "boxes": ((0, 4), "float32"), "labels": ((0,), "int64"), "scores": ((0,), "float32"),
    }  # fmt: skip


def test_the_file_is_standard_and_says_what_it_is(files):
    checkpoint, file = files
    model = onnx.load(file)
    onnx.checker.check_model(model, full_check=True)
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 18)]
    assert len(model.functions) == 0
    assert not {"BatchNormalization", "Dropout"} & {node.op_type for node in model.graph.node}
    assert str(ROOT).encode() not in model.SerializeToString()
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert metadata["model"] == file.stem
    classes = Detector.load(checkpoint, device="cpu").classes
    assert json.loads(metadata["classes"]) == classes and classes[0] == "background"


def test_the_lines_of_the_usage_page_detect_without_torch(lite):
    (code,) = re.findall(r"```python\n(.*?)```", USAGE, re.DOTALL)
    block = "import sys\nsys.modules |= dict.fromkeys(['torch', 'torchvision', 'src'])\n"
    settings = {"cwd": lite.parent, "env": ENV, "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, "-c", block + code], **settings)
    assert (done.returncode, done.stderr) == (0, "")
    file = ROOT / re.search(r'"(demo/\S+\.jpg)"', code)[1]
    detector = Detector.load(SHAPES, device="cpu")
    expected = detector([read_image(file)], 0.3)[0]
    lines = done.stdout.splitlines()
    names = [detector.classes[label] for label in expected["labels"]]
    assert [line.split()[0] for line in lines] == names and names
    for line, box, score in zip(lines, expected["boxes"], expected["scores"], strict=True):
        printed = [float(number) for number in line.split()[1:]]
        assert printed[0] == pytest.approx(float(score), abs=0.01)
        assert printed[1:] == pytest.approx(box.tolist(), abs=1)


def test_the_network_alone_detects_with_the_lines_of_the_usage_page(tmp_path, monkeypatch, capsys):
    """In OpenCV, which refuses the whole detector; the image is shrunk otherwise, so not to the pixel."""
    text = (ROOT / "docs" / "usage.md").read_text().split("## Other runtimes")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (tmp_path / "demo").symlink_to(ROOT / "demo")
    monkeypatch.chdir(tmp_path)
    detector = Detector.load(SHAPES, device="cpu")
    model = runpy.run_path(str(ROOT / "export.py"))["export"](detector, network_only=True)
    onnx.save(model, "network.onnx")
    exec(code)
    found = [[float(number) for number in line.split()] for line in capsys.readouterr().out.splitlines()]
    expected = detector([read_image(IMAGES[0])], 0.3)[0]
    assert len(found) == len(expected["labels"]) > 1
    for label, box, score in zip(*(expected[key].tolist() for key in ("labels", "boxes", "scores")), strict=True):
        assert any(one == pytest.approx([label, score, *box], abs=4) and abs(one[1] - score) < 0.05 for one in found)
    pixels = resize(read_image(IMAGES[0]), 300)
    boxes, scores = onnxruntime.InferenceSession("network.onnx").run(None, {"pixels": pixels[None].astype(np.float32)})
    loc, cls_logits = forward(detector.network, normalize(torch.from_numpy(pixels[None])))
    np.testing.assert_allclose(scores, cls_logits[0].softmax(1).T[1:], atol=1e-5)
    np.testing.assert_allclose(boxes, detector.encoder.apply_offsets(loc[0]), atol=1e-5)
    assert json.loads({entry.key: entry.value for entry in model.metadata_props}["classes"]) == detector.classes


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_a_missing_package_is_one_line(package, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, package, None)
    assert run_here(monkeypatch, "export.py", "--help") == 2
    assert capfd.readouterr().err == f"error: {package} is missing: pip install -r requirements-export.txt\n"


def test_a_users_mistake_is_one_line_and_writes_nothing(tmp_path, monkeypatch, capfd):
    (tmp_path / "broken.pth").write_bytes(SHAPES.read_bytes()[:1000])
    shutil.copy(SHAPES, tmp_path / "good.pth")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    for checkpoint, output, named in [
        ("broken.pth", "a.onnx", "broken.pth"),
        ("none.pth", "a.onnx", "none.pth"),
        ("good.pth", ".", "--output"),
        ("good.pth", "broken.pth/a.onnx", "--output"),
        ("good.pth", "good.pth", "--output"),
    ]:
        files = "--pretrained-model", tmp_path / checkpoint, "--output", tmp_path / output
        assert run_here(monkeypatch, "export.py", *files) == 2
        error = capfd.readouterr().err
        assert named in error and error.startswith("error: ") and error.count("\n") == 1
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
