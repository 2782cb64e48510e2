"""src.detector: folding changes nothing, and pixel boxes come out where the image has them."""

import copy
import json

import numpy as np
import pytest
import torch
from reference.inputs import image
from runs import ROOT
from samples import reference_network
from torch import nn
from torch.testing import assert_close
from torchvision.ops import box_iou

from src.boxes import box_cxcywh_to_xyxy, make_default_boxes
from src.classes import VOC_CLASSES
from src.detector import Detector, detect_in_tiles, fold_batch_norm, json_entry, tile_starts
from src.distributed import amp_note
from src.images import read_image

MODELS = ("ssd", "ssdlite")
CLASSES = ["background"] + [f"class {k}" for k in range(1, 8)]
SIZES = [(300, 300), (120, 400), (501, 77), (1, 1)]  # height, width


@pytest.fixture(scope="module")
def models():
    return {name: reference_network(name, len(CLASSES)) for name in MODELS}


@pytest.fixture(scope="module")
def detectors(models):
    return {name: make_detector(models[name], name) for name in MODELS}


def make_detector(model, name, **options):
    return Detector(model, name, CLASSES, list(range(1, 8)), device="cpu", **options)


def some_images():
    """Pictures of SIZES, in colors."""
    return [
        np.ascontiguousarray(image(seed, max(size))[: size[0], : size[1]])
        if max(size) > 1
        else np.full((1, 1, 3), 90, np.uint8)
        for seed, size in enumerate(SIZES)
    ]


def batch_norms(model):
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


@pytest.mark.parametrize("name", MODELS)
def test_folding_batch_norm_leaves_outputs_unchanged(name, models):
    assert batch_norms(models[name]) > 50
    folded = fold_batch_norm(copy.deepcopy(models[name]))
    assert batch_norms(folded) == 0
    images = torch.randn(2, 3, 300, 300, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert_close(list(folded(images)), list(models[name](images)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_the_original_model_is_left_as_it_was(name, models):
    model = copy.deepcopy(models[name]).train()
    before = copy.deepcopy(model.state_dict())
    detector = make_detector(model, name, amp=True)
    detector(some_images()[:1])
    assert model.training
    assert batch_norms(model) == batch_norms(models[name]) and batch_norms(detector.network) == 0
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert all(after[key].dtype == before[key].dtype for key in before)


@pytest.mark.parametrize("name", MODELS)
def test_detections_lie_inside_each_image(name, detectors):
    found = detectors[name](some_images(), score_threshold=0.2)
    assert len(found) == len(SIZES)
    for one, (height, width) in zip(found, SIZES, strict=True):
        boxes, labels, scores = one["boxes"], one["labels"], one["scores"]
        assert 0 < len(boxes) == len(labels) == len(scores) <= 200
        assert boxes.dtype == torch.float32 and labels.dtype == torch.int64
        assert boxes.min() >= 0
        assert (boxes <= torch.tensor([width, height, width, height])).all()
        assert (boxes[:, :2] <= boxes[:, 2:]).all()
        assert boxes[:, 2].max() > 0.9 * width and boxes[:, 3].max() > 0.9 * height
        assert labels.min() >= 1 and labels.max() < len(CLASSES)
        assert scores.min() > 0.2 and (scores.diff() <= 0).all()


@pytest.mark.parametrize("name", MODELS)
def test_a_list_of_images_equals_each_alone(name, detectors):
    images = some_images()[:2]
    together = detectors[name](images, score_threshold=0.3)
    for one, pixels in zip(together, images, strict=True):
        (alone,) = detectors[name]([pixels], score_threshold=0.3)
        assert len(alone["scores"]) > 5
        assert one["labels"].tolist() == alone["labels"].tolist()
        assert_close(one["boxes"], alone["boxes"], rtol=0, atol=0.01)
        assert_close(one["scores"], alone["scores"], rtol=0, atol=1e-4)


def test_no_images_no_detections(detectors):
    assert detectors["ssdlite"]([]) == []


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("level", [0, 255])
def test_black_and_white_images(name, level, detectors):
    (found,) = detectors[name]([np.full((40, 60, 3), level, np.uint8)])
    assert found["boxes"].shape == (len(found["scores"]), 4)
    assert found["boxes"].isfinite().all() and found["scores"].isfinite().all()


@pytest.mark.parametrize("name", MODELS)
def test_half_precision_roughly_agrees(name, models, detectors):
    half = make_detector(models[name], name, amp=True)
    assert {p.dtype for p in half.network.parameters()} == {torch.bfloat16}
    x = torch.randn(1, 3, 300, 300, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        outputs = zip(detectors[name].network(x), half.network(x.bfloat16()), strict=True)
        for exact, rough in outputs:
            assert (rough.float() - exact).norm() < 0.03 * exact.norm()
    (exact,), (rough,) = detectors[name](some_images()[:1]), half(some_images()[:1])
    assert rough["boxes"].dtype == rough["scores"].dtype == torch.float32
    for k in range(10):  # NMS may choose otherwise among near-equals
        same = rough["labels"] == exact["labels"][k]
        overlap = box_iou(exact["boxes"][k : k + 1], rough["boxes"][same])[0]
        assert overlap.max() > 0.5
        assert abs(rough["scores"][same][overlap.argmax()] - exact["scores"][k]) < 0.05


class Only(nn.Module):
    """A network that is sure of one default box, and of its class, whatever it sees."""

    def __init__(self, index, label):
        super().__init__()
        self.index, self.label = index, label

    def forward(self, images):
        logits = torch.zeros(len(images), 8732, len(CLASSES))
        logits[:, self.index, self.label] = 20
        return torch.zeros(len(images), 8732, 4), logits


@pytest.mark.parametrize("index", [0, 37, 1000, 6000, 8731])
def test_a_default_box_comes_out_at_its_pixels(index):
    detector = make_detector(Only(index, 4), "ssd")
    sizes = [(100, 250), (333, 40)]
    found = detector([np.zeros((*size, 3), np.uint8) for size in sizes], score_threshold=0.5)
    for one, (height, width) in zip(found, sizes, strict=True):
        x1, y1, x2, y2 = box_cxcywh_to_xyxy(make_default_boxes("ssd")[index]).clamp(0, 1).tolist()
        expected = [[x1 * width, y1 * height, x2 * width, y2 * height]]
        assert_close(one["boxes"], torch.tensor(expected), rtol=0, atol=1e-3)
        assert one["labels"].tolist() == [4]


class Brightest(nn.Module):
    """A network that detects class 1 in the brightest of 38 x 38 cells: its smallest square."""

    def forward(self, images):
        cells = nn.functional.avg_pool2d(images.mean(dim=1), 8, ceil_mode=True)
        logits = torch.zeros(len(images), 8732, len(CLASSES))
        logits[torch.arange(len(images)), cells.flatten(1).argmax(dim=1), 1] = 20
        return torch.zeros(len(images), 8732, 4), logits


@pytest.mark.parametrize("row, column", [(2, 5), (4, 35), (35, 3), (20, 20)])
def test_a_bright_spot_is_found_where_it_is(row, column):
    height, width = 150, 600  # half and twice the network's size, where a cell is 8 pixels
    image = np.zeros((height, width, 3), np.uint8)
    image[row * 4 : row * 4 + 4, column * 16 : column * 16 + 16] = 255
    (found,) = make_detector(Brightest(), "ssd")([image], score_threshold=0.5)
    x, y = column * 16 + 8, row * 4 + 2
    expected = [[x - 21, y - 5.25, x + 21, y + 5.25]]  # the smallest default box: 21 of 300 pixels
    assert_close(found["boxes"], torch.tensor(expected), rtol=0, atol=1e-3)


def test_a_loaded_detector_is_the_one_that_was_saved(tmp_path, models, detectors):
    path = tmp_path / "ssdlite.pth"
    state = {"model": "ssdlite", "model_state_dict": models["ssdlite"].state_dict()}
    torch.save(state | {"classes": CLASSES, "category_ids": [2, 3, 5, 7, 11, 13, 17]}, path)
    loaded = Detector.load(path, device="cpu")
    assert loaded.classes == CLASSES and loaded.category_ids == [2, 3, 5, 7, 11, 13, 17]
    expected, found = (d(some_images()[:1])[0] for d in (detectors["ssdlite"], loaded))
    for key in expected:
        assert torch.equal(found[key], expected[key])


class Painted:
    """A detector of what is painted in one level, its label; blind to what is narrower than a tenth of the image."""

    size = 300

    def __call__(self, images, score_threshold, nms_threshold):
        (image,) = images
        boxes = torch.zeros(0, 4)
        labels = []
        for label in np.unique(image[image > 0]).tolist():
            y, x = np.nonzero(image[..., 0] == label)
            if x.max() + 1 - x.min() > image.shape[1] / 10:
                box = [[x.min(), y.min(), x.max() + 1, y.max() + 1]]
                boxes, labels = torch.cat([boxes, torch.tensor(box)]), [*labels, label]
        return [{"boxes": boxes, "labels": torch.tensor(labels).long(), "scores": torch.full((len(labels),), 0.9)}]


@pytest.mark.parametrize("side", [200, 240, 333, 999, 5000])
def test_tiles_find_each_object_once_and_no_piece_of_one(side):
    """Small ones wherever they lie, on borders of tiles, too; large ones in the whole image alone."""
    painted = {(x, y, x + 45, y + 30) for x in range(0, 960, 160) for y in range(0, 700, 90)} | {(955, 670, 1000, 700)}
    painted = sorted(painted) if side < 400 else []
    painted.append((180, 35, 640, 660))
    image = np.zeros((700, 1000, 3), np.uint8)
    for label, (left, top, right, bottom) in reversed(list(enumerate(painted, start=1))):
        image[top:bottom, left:right] = label
    labels = np.unique(image)[1:].tolist()
    found = detect_in_tiles(Painted(), image, side)
    boxes = {label: box for label, box in zip(found["labels"].tolist(), found["boxes"].tolist(), strict=True)}
    assert len(found["labels"]) == len(boxes) == len(labels) == len(painted)
    for label in labels:
        y, x = np.nonzero(image[..., 0] == label)
        assert boxes[label] == [x.min(), y.min(), x.max() + 1, y.max() + 1]


@pytest.mark.parametrize("side, calls", [(299, 5), (300, 1), (999, 1)])
def test_an_image_that_fits_into_a_tile_is_processed_once(side, calls):
    seen = []

    class Counted(Painted):
        def __call__(self, images, *thresholds):
            seen.extend(images)
            return super().__call__(images, *thresholds)

    detect_in_tiles(Counted(), np.zeros((300, 300, 3), np.uint8), side)
    assert len(seen) == calls


@pytest.mark.parametrize("length, side", [(1000, 300), (1001, 300), (301, 300), (300, 300), (40, 300)])
def test_tiles_cover_the_image_and_share_a_half(length, side):
    starts = tile_starts(length, side)
    assert starts[0] == 0 and starts[-1] == max(0, length - side)
    assert all(0 < after - before <= side / 2 + 1 for before, after in zip(starts, starts[1:], strict=False))


def test_tiles_keep_the_thresholds_and_the_better_of_two():
    """Two classes may share a place; of each, NMS over all tiles keeps the higher score."""

    def detector(images, score_threshold, nms_threshold):
        assert (score_threshold, nms_threshold) == (0.2, 0.4)
        y, x = np.argwhere(images[0][..., 0])[0].tolist()
        box = torch.tensor([[x, y, x + 20.0, y + 20]]).repeat(2, 1)
        scores = torch.tensor([0.5, 0.3]) + images[0].shape[1] / 1000  # the higher, the more is seen
        return [{"boxes": box, "labels": torch.tensor([1, 2]), "scores": scores}]

    detector.size = 300
    image = np.zeros((80, 100, 3), np.uint8)
    image[20, 30] = 255
    found = detect_in_tiles(detector, image, 90, 0.2, 0.4)
    assert found["labels"].tolist() == [1, 2]
    assert found["boxes"].tolist() == [[30, 20, 50, 40]] * 2
    assert_close(found["scores"], torch.tensor([0.6, 0.4]))


@pytest.mark.parametrize(
    "machine, native, slow", [("x86_64", False, True), ("x86_64", True, False), ("arm64", False, False)]
)
def test_amp_on_a_cpu_without_bfloat16_is_said_to_be_slow(monkeypatch, machine, native, slow):
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    origins = [Detector.load(ROOT / "demo" / "ssdlite_shapes.pth", "cpu", amp).origin for amp in (False, True)]
    assert [("--amp is slow" in origin) for origin in origins] == [False, slow]
    assert amp_note(torch.device("cuda"), amp=True) == ""


def test_record_names_labels_and_the_images_size():
    found = {"boxes": torch.tensor([[1.0, 2, 3, 4]]), "labels": torch.tensor([2]), "scores": torch.tensor([0.5])}
    assert json_entry(np.zeros((20, 30, 3), np.uint8), found, CLASSES) == {
        "width": 30,
        "height": 20,
        "detections": [{"label": "class 2", "score": 0.5, "box": [1.0, 2.0, 3.0, 4.0]}],
    }


def test_the_bundled_detector_knows_vocs_twenty_classes():
    file = ROOT / "demo" / "ssdlite_voc.pth"
    assert file.stat().st_size < 8e6
    detector = Detector.load(file)
    assert detector.classes == ["background", *VOC_CLASSES] and detector.category_ids == list(range(1, 21))
    photos = ROOT.parent / "shared" / "data" / "coco_real" / "val2017"
    if not photos.is_dir():
        pytest.skip("no ../shared next to the repository")
    # What COCO's annotators drew, xywh.
    ground_truth = json.loads((photos.parent / "annotations" / "instances_val2017.json").read_text())
    names = {category["id"]: category["name"] for category in ground_truth["categories"]}
    for image_id, label, coco in ((208901, "aeroplane", "airplane"), (555009, "tvmonitor", "tv")):
        (found,) = detector([read_image(photos / f"{image_id:012}.jpg")], score_threshold=0.5)
        boxes = found["boxes"][found["labels"] == detector.classes.index(label)]
        here = [a for a in ground_truth["annotations"] if a["image_id"] == image_id]
        drawn = [a["bbox"] for a in here if names[a["category_id"]] == coco]
        drawn = torch.tensor([(x, y, x + w, y + h) for x, y, w, h in drawn])
        assert len(boxes) and (box_iou(boxes, drawn).amax(dim=1) >= 0.5).all()
