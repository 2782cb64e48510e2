"""src.boxes against the SSD paper, the reference values, and plain Python written from the text."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from reference.inputs import ground_truth, predictions
from torch.testing import assert_close
from torchvision.ops import box_iou

from src.boxes import Encoder, make_default_boxes, pairwise_iou, to_centres, to_corners

REFERENCE = Path(__file__).parent / "reference"
MODELS = ("ssd", "ssdlite")
# SSD section 2.2: cells of each map, and default boxes a cell.
MAPS = {"ssd": ((38, 19, 10, 5, 3, 1), (4, 6, 6, 6, 4, 4)), "ssdlite": ((19, 10, 5, 3, 2, 1), (6, 6, 6, 6, 6, 6))}


def tensors(boxes, labels):
    return torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), torch.tensor(labels).long()


def certain(cls_targets, num_classes):
    """Logits (1, D, C) that make each default box's class in cls_targets (D,) nearly certain."""
    return 20.0 * torch.nn.functional.one_hot(cls_targets, num_classes)[None].float()


# Default boxes


@pytest.mark.parametrize("name", MODELS)
def test_default_boxes_equal_the_reference(name):
    expected = torch.from_numpy(np.load(REFERENCE / f"default_boxes_{name}.npy"))
    boxes = make_default_boxes(name)
    assert boxes.dtype == torch.float32
    assert_close(boxes, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name, total", [("ssd", 8732), ("ssdlite", 3000)])
def test_number_of_default_boxes(name, total):
    # SSD section 3.1: 8732 boxes for SSD300. Centres of a map's boxes are its cells', k times.
    boxes = make_default_boxes(name)
    assert boxes.shape == (total, 4)
    counts = [cells * cells * k for cells, k in zip(*MAPS[name], strict=True)]
    if name == "ssd":
        assert counts == [5776, 2166, 600, 150, 36, 4]
    for part, cells, k in zip(boxes.split(counts), *MAPS[name], strict=True):
        centres, repeats = part[:, :2].unique(dim=0, return_counts=True)
        assert len(centres) == cells * cells
        assert (repeats == k).all()


@pytest.mark.parametrize(
    "name, start, cells, row, column, centre, size, next_size",
    [("ssd", 5776, 19, 3, 5, (5.5 * 16, 3.5 * 16), 45, 99), ("ssdlite", 2766, 5, 1, 4, (4.5 * 64, 1.5 * 64), 150, 195)],
)
def test_one_cell_by_hand(name, start, cells, row, column, centre, size, next_size):
    # SSD section 2.2: s_k, s'_k = sqrt(s_k s_k+1), w = s_k sqrt(a), h = s_k / sqrt(a)
    shapes = [(size, size), (math.sqrt(size * next_size), math.sqrt(size * next_size))]
    for a in (2, 1 / 2, 3, 1 / 3):
        shapes.append((size * math.sqrt(a), size / math.sqrt(a)))
    if name == "ssd":
        assert shapes[2] == pytest.approx((63.6396, 31.8198), abs=1e-4)
        assert shapes[5] == pytest.approx((25.9808, 77.9423), abs=1e-4)
    index = [start + shape * cells**2 + row * cells + column for shape in range(6)]
    expected = torch.tensor([(*centre, *shape) for shape in shapes]) / 300
    assert_close(make_default_boxes(name)[index], expected, rtol=0, atol=1e-6)


# Geometry


def test_corners_and_centres_by_hand():
    centres, corners = torch.tensor([[0.5, 0.25, 0.5, 0.125]]), [[0.25, 0.1875, 0.75, 0.3125]]
    assert to_corners(centres).tolist() == corners
    assert to_centres(torch.tensor(corners)).tolist() == centres.tolist()


def test_pairwise_iou_equals_torchvision():
    generator = torch.Generator().manual_seed(0)
    a, b = (to_corners(torch.rand(n, 4, generator=generator)) for n in (40, 70))
    assert_close(pairwise_iou(a, b), box_iou(a, b), rtol=1e-5, atol=1e-6)


def test_iou_of_touching_and_distant_boxes_is_zero():
    a = torch.tensor([[0, 0, 0.5, 0.5]])
    b = torch.tensor([[0.5, 0, 1, 0.5], [0.75, 0.75, 1, 1]])
    assert pairwise_iou(a, b).tolist() == [[0, 0]]


# Matching


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("seed", range(8))
def test_encode_equals_the_reference(name, seed):
    reference = np.load(REFERENCE / "encode.npz")
    encoder = Encoder(make_default_boxes(name))
    loc_targets, cls_targets = encoder.encode(*tensors(*ground_truth(seed)))
    positive = torch.from_numpy(reference[f"{name}_{seed}_pos"])
    assert cls_targets.nonzero().squeeze(1).tolist() == positive.tolist()
    assert cls_targets[positive].tolist() == reference[f"{name}_{seed}_labels"].tolist()
    expected = torch.zeros_like(loc_targets)
    expected[positive] = torch.from_numpy(reference[f"{name}_{seed}_loc"])
    assert_close(loc_targets, expected, rtol=0, atol=1e-3)


def test_encode_by_hand():
    # Centre moved by (0.01, -0.02), sizes 5/4 and 3/4 of the default box; variances 0.1 and 0.2.
    encoder = Encoder(torch.tensor([[0.5, 0.5, 0.2, 0.4]]))
    loc, cls = encoder.encode(*tensors([[0.385, 0.33, 0.635, 0.63]], [7]))
    expected = [0.01 / 0.2 / 0.1, -0.02 / 0.4 / 0.1, math.log(1.25) / 0.2, math.log(0.75) / 0.2]
    assert expected == pytest.approx([0.5, -0.5, 1.115718, -1.438410], abs=1e-6)
    assert loc[0].tolist() == pytest.approx(expected, abs=1e-5)
    assert cls.tolist() == [7]


def test_overlap_must_exceed_one_half():
    # SSD section 2.2: "higher than a threshold (0.5)". IoU of the object with the second default
    # box is exactly 1/2, then a little more.
    encoder = Encoder(to_centres(torch.tensor([[0, 0, 0.5, 0.5], [0, 0, 0.5, 1]])))
    assert encoder.encode(*tensors([[0, 0, 0.5, 0.5]], [3]))[1].tolist() == [3, 0]
    assert encoder.encode(*tensors([[0, 0, 0.5, 0.515625]], [3]))[1].tolist() == [3, 3]


def test_a_default_box_takes_the_object_it_overlaps_most():
    # The first two default boxes are the objects' own; the third overlaps both by more than half.
    defaults = torch.tensor([[0, 0, 1, 0.75], [0, 0, 1, 1], [0, 0, 1, 0.8125]])
    objects = [[0, 0, 1, 0.75], [0, 0, 1, 1]]
    encoder = Encoder(to_centres(defaults))
    assert encoder.encode(*tensors(objects, [1, 2]))[1].tolist() == [1, 2, 1]
    assert encoder.encode(*tensors(objects[::-1], [2, 1]))[1].tolist() == [1, 2, 1]


@pytest.mark.parametrize("name", MODELS)
def test_every_object_gets_its_best_default_box_whatever_the_overlap(name):
    # SSD section 2.2: each ground truth box is matched to the default box with the best overlap.
    objects = [[0.1, 0.1, 0.11, 0.11], [0.5, 0.5, 0.99, 0.51], [0.7, 0.02, 0.71, 0.4]]
    boxes, labels = tensors(objects, [1, 2, 3])
    defaults = make_default_boxes(name)
    best, index = box_iou(boxes, to_corners(defaults)).max(dim=1)
    assert (best < 0.5).all()
    cls = Encoder(defaults).encode(boxes, labels)[1]
    assert cls[index].tolist() == [1, 2, 3]
    assert (cls > 0).sum() == 3


@pytest.mark.parametrize("first", [0, 1])
def test_where_two_objects_want_one_default_box_the_later_has_it(first):
    encoder = Encoder(torch.tensor([[0.25, 0.25, 0.5, 0.5], [0.75, 0.75, 0.5, 0.5]]))
    objects = [[0, 0, 0.5, 0.5], [0, 0, 0.5, 0.375]]
    order = [first, 1 - first]
    boxes, labels = tensors([objects[k] for k in order], [k + 1 for k in order])
    loc, cls = encoder.encode(boxes, labels)
    assert cls.tolist() == [labels[1], 0]
    dy = (0, -0.0625 / 0.5 / 0.1)[order[1]]
    assert loc[0, 1].item() == pytest.approx(dy, abs=1e-6)
    assert loc[1].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("name", MODELS)
def test_no_objects_make_no_targets(name):
    defaults = make_default_boxes(name)
    loc, cls = Encoder(defaults).encode(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    assert loc.shape == defaults.shape and not loc.any() and loc.dtype == torch.float32
    assert cls.shape == defaults.shape[:1] and not cls.any() and cls.dtype == torch.int64


# Decoding


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("seed", range(4))
def test_decode_equals_the_reference(name, seed):
    reference = np.load(REFERENCE / "decode.npz")
    defaults = make_default_boxes(name)
    outputs = predictions(seed, len(defaults), num_objects=(0, 3, 20, 60)[seed])
    loc, logits = (torch.from_numpy(output)[None] for output in outputs)
    (found,) = Encoder(defaults).decode(loc, logits, 0.05, (0.5, 0.45)[seed % 2])
    boxes, labels, scores = (
        torch.from_numpy(reference[f"{name}_{seed}_{key}"]) for key in ("boxes", "labels", "scores")
    )
    assert found["labels"].tolist() == labels.tolist()
    assert_close(found["boxes"], boxes.clamp(0, 1), rtol=0, atol=1e-5)
    assert_close(found["scores"], scores, rtol=0, atol=1e-5)


def test_decode_by_hand():
    encoder = Encoder(torch.tensor([[0.5, 0.5, 0.2, 0.4]]))
    loc = torch.tensor([[[0.5, -0.5, math.log(1.25) / 0.2, math.log(0.75) / 0.2]]])
    logits = torch.tensor([[[0, 0, math.log(6)]]])  # softmax 1/8, 1/8, 6/8
    (found,) = encoder.decode(loc, logits, score_threshold=0.5)
    assert found["boxes"][0].tolist() == pytest.approx([0.385, 0.33, 0.635, 0.63], abs=1e-6)
    assert found["labels"].tolist() == [2]
    assert found["scores"].tolist() == pytest.approx([0.75], abs=1e-6)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("seed", [1, 2, 3, 5])  # 0 and 4: an object may lose its only default box
def test_decode_gives_back_what_encode_was_given(name, seed):
    boxes, labels = tensors(*ground_truth(seed))
    encoder = Encoder(make_default_boxes(name))
    loc, cls = encoder.encode(boxes, labels)
    logits = certain(cls, 81)
    (found,) = encoder.decode(loc[None], logits, score_threshold=0.5, nms_threshold=1.1)
    assert len(found["boxes"]) == (cls > 0).sum()
    distance = (found["boxes"][:, None] - boxes).abs().amax(dim=2)  # (K, G)
    distance[found["labels"][:, None] != labels] = 1
    assert distance.amin(dim=1).max() < 1e-5  # each detection is an object
    assert distance.amin(dim=0).max() < 1e-5  # each object is detected


def python_iou(a, b):
    width = max(0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0, min(a[3], b[3]) - max(a[1], b[1]))
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return width * height / (sum(areas) - width * height)


def python_decode(defaults, loc, logits, score_threshold, nms_threshold):
    """[(score, label, box)] by the definition, on lists of floats; 200 a class and 200 in all."""
    boxes, scores = [], []
    for (cx, cy, w, h), (dx, dy, dw, dh), row in zip(defaults, loc, logits, strict=True):
        cx, cy = cx + 0.1 * dx * w, cy + 0.1 * dy * h
        w, h = w * math.exp(0.2 * dw), h * math.exp(0.2 * dh)
        boxes.append((cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2))
        total = sum(math.exp(logit) for logit in row)
        scores.append([math.exp(logit) / total for logit in row])
    found = []
    for label in range(1, len(logits[0])):
        candidates = [d for d in range(len(boxes)) if scores[d][label] > score_threshold]
        candidates = sorted(candidates, key=lambda d: -scores[d][label])[:200]
        kept = []
        for d in candidates:
            if all(python_iou(boxes[d], boxes[other]) <= nms_threshold for other in kept):
                kept.append(d)
        found += [(scores[d][label], label, [min(max(v, 0), 1) for v in boxes[d]]) for d in kept]
    return sorted(found, reverse=True)[:200]


@pytest.mark.parametrize("score_threshold, nms_threshold", [(0, 0.5), (0.01, 0.45), (0.1, 0.3), (0.5, 0.5), (0.2, 0.9)])
def test_decode_equals_plain_python(score_threshold, nms_threshold):
    # SSD section 3.7: score threshold, NMS per class, top 200 of the image.
    generator = torch.Generator().manual_seed(1)
    centres, sizes = torch.rand(2, 400, 2, generator=generator)
    defaults = torch.cat([centres, 0.05 + 0.4 * sizes], dim=1)
    loc = torch.randn(1, 400, 4, generator=generator)
    logits = 2 * torch.randn(1, 400, 5, generator=generator)
    (found,) = Encoder(defaults).decode(loc, logits, score_threshold, nms_threshold)
    lists = (tensor.double().tolist() for tensor in (defaults, loc[0], logits[0]))
    scores, labels, boxes = zip(*python_decode(*lists, score_threshold, nms_threshold), strict=True)
    assert found["labels"].tolist() == list(labels)
    assert_close(found["boxes"], torch.tensor(boxes), rtol=0, atol=1e-5)
    assert_close(found["scores"], torch.tensor(scores), rtol=0, atol=1e-5)


@pytest.mark.parametrize("nms_threshold, survivors", [(0.5, 2), (0.49, 1)])
def test_nms_keeps_what_overlaps_exactly_by_the_threshold(nms_threshold, survivors):
    encoder = Encoder(to_centres(torch.tensor([[0, 0, 0.5, 0.5], [0, 0, 0.5, 1]])))  # IoU 1/2
    logits = certain(torch.tensor([1, 1]), 2)
    (found,) = encoder.decode(torch.zeros(1, 2, 4), logits, nms_threshold=nms_threshold)
    assert len(found["boxes"]) == survivors


def test_nms_leaves_other_classes_alone():
    encoder = Encoder(torch.tensor([[0.5, 0.5, 0.4, 0.4]] * 3))
    logits = certain(torch.tensor([2, 1, 2]), 3)
    (found,) = encoder.decode(torch.zeros(1, 3, 4), logits)
    assert sorted(found["labels"].tolist()) == [1, 2]


@pytest.mark.parametrize(
    "corners, survivors",
    [
        ([[-0.5, 0, 0.25, 0.5], [0, 0, 0.25, 0.5]], 2),  # IoU 1/3; equal after clipping
        ([[-1, 0, 0.25, 0.5], [-1, 0, 0.125, 0.5]], 1),  # IoU 0.9; 1/2 after clipping
    ],
)
def test_nms_sees_unclipped_boxes(corners, survivors):
    encoder = Encoder(to_centres(torch.tensor(corners)))
    logits = certain(torch.tensor([1, 1]), 2)
    (found,) = encoder.decode(torch.zeros(1, 2, 4), logits)
    assert len(found["boxes"]) == survivors
    assert found["boxes"].min() == 0


def test_a_class_has_at_most_200_candidates():
    # The 200 best lie on one another; what comes after them is never looked at.
    defaults = torch.tensor([[0.25, 0.25, 0.1, 0.1]] * 200 + [[0.75, 0.75, 0.1, 0.1]])
    logits = torch.zeros(1, 201, 3)
    logits[0, :200, 1], logits[0, 200, 1], logits[0, 200, 2] = 5, 4, 3
    (found,) = Encoder(defaults).decode(torch.zeros(1, 201, 4), logits, score_threshold=0.2)
    assert found["labels"].tolist() == [1, 2]
    assert_close(found["boxes"], to_corners(defaults[[0, 200]]))


def test_scores_count_from_the_papers_threshold_on():
    # SSD section 3.7: "a confidence threshold of 0.01".
    defaults = torch.tensor([[0.2, 0.2, 0.1, 0.1], [0.8, 0.8, 0.1, 0.1]])
    scores = torch.tensor([0.009, 0.011])
    logits = torch.stack([1 - scores, scores], dim=1).log()[None]
    (found,) = Encoder(defaults).decode(torch.zeros(1, 2, 4), logits)
    assert found["scores"].tolist() == pytest.approx([0.011])


def test_at_most_200_detections_the_best_first():
    cells = torch.arange(400)
    centres = torch.stack([(cells % 20 + 0.5) / 20, (cells // 20 + 0.5) / 20], dim=1)
    encoder = Encoder(torch.cat([centres, torch.full((400, 2), 0.04)], dim=1))
    logits = torch.randn(1, 400, 3, generator=torch.Generator().manual_seed(2))
    (found,) = encoder.decode(torch.zeros(1, 400, 4), logits)
    best = logits[0].softmax(dim=1)[:, 1:].flatten().sort(descending=True).values[:200]
    assert_close(found["scores"], best)
    (few,) = encoder.decode(torch.zeros(1, 400, 4), logits, max_detections=7)
    assert_close(few["scores"], best[:7])


@pytest.mark.parametrize("name", MODELS)
def test_a_batch_equals_its_images(name):
    defaults = make_default_boxes(name)
    images = [predictions(seed, len(defaults), num_objects=4 * seed) for seed in range(3)]
    loc, logits = (torch.from_numpy(np.stack(part)) for part in zip(*images, strict=True))
    encoder = Encoder(defaults)
    batch = encoder.decode(loc, logits, score_threshold=0.05)
    assert len(batch) == 3
    assert [len(found["scores"]) > 0 for found in batch] == [False, True, True]
    for b, found in enumerate(batch):
        (alone,) = encoder.decode(loc[b : b + 1], logits[b : b + 1], score_threshold=0.05)
        for key in ("boxes", "labels", "scores"):
            assert torch.equal(found[key], alone[key])


@pytest.mark.parametrize("score_threshold, background", [(0.5, 9.0), (1, 0.0), (1, -99.0)])
def test_nothing_above_the_threshold_is_an_empty_detection(score_threshold, background):
    defaults = make_default_boxes("ssdlite")
    logits = torch.zeros(2, len(defaults), 4)
    logits[..., 0], logits[..., 1] = background, 1 + 99.0 * (background < 0)  # score 1.0 exactly
    encoder = Encoder(defaults)
    for found in encoder.decode(torch.zeros(2, len(defaults), 4), logits, score_threshold):
        assert [found[key].shape for key in ("boxes", "labels", "scores")] == [(0, 4), (0,), (0,)]
        assert found["labels"].dtype == torch.int64
        assert found["boxes"].dtype == found["scores"].dtype == torch.float32


@pytest.mark.parametrize("score_threshold", [0, 0.01, 0.05, 0.3, 0.5, 0.9, 0.99])
def test_the_shortcut_before_softmax_loses_nothing(score_threshold):
    generator = torch.Generator().manual_seed(3)
    spread = torch.rand(2000, 1, generator=generator) * 6
    logits = torch.randn(2000, 6, generator=generator) * spread
    encoder = Encoder(torch.rand(2000, 4, generator=generator))
    # No box is removed by NMS at a threshold above 1, none by an ample max_detections.
    (found,) = encoder.decode(torch.zeros(1, 2000, 4), logits[None], score_threshold, 1.1, max_detections=10000)
    scores = logits.softmax(dim=1)[:, 1:]
    for label in range(1, 6):
        expected = scores[:, label - 1]
        expected = expected[expected > score_threshold].sort(descending=True).values
        assert len(expected) > 0
        assert_close(found["scores"][found["labels"] == label], expected)
