"""src.boxes against the reference values, torchvision, and values worked out by hand.

What the paper states is in paper/: test_default_boxes.py, test_matching.py, test_inference.py.
"""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from reference.inputs import ground_truth, predictions
from samples import certain_logits, tensors
from torch.testing import assert_close
from torchvision.ops import box_iou

from src.boxes import Encoder, box_cxcywh_to_xyxy, box_xyxy_to_cxcywh, make_default_boxes, pairwise_iou

REFERENCE = Path(__file__).parent / "reference"
MODELS = ("ssd", "ssdlite")


# Default boxes


@pytest.mark.parametrize("name", MODELS)
def test_default_boxes_equal_the_reference(name):
    expected = torch.from_numpy(np.load(REFERENCE / f"default_boxes_{name}.npy"))
    boxes = make_default_boxes(name)
    assert boxes.dtype == torch.float32
    assert_close(boxes, expected, rtol=0, atol=1e-6)


# Geometry


def test_corners_and_centers_by_hand():
    centers, corners = torch.tensor([[0.5, 0.25, 0.5, 0.125]]), [[0.25, 0.1875, 0.75, 0.3125]]
    assert box_cxcywh_to_xyxy(centers).tolist() == corners
    assert box_xyxy_to_cxcywh(torch.tensor(corners)).tolist() == centers.tolist()


def test_pairwise_iou_equals_torchvision():
    generator = torch.Generator().manual_seed(0)
    a, b = (box_cxcywh_to_xyxy(torch.rand(n, 4, generator=generator)) for n in (40, 70))
    assert_close(pairwise_iou(a, b), box_iou(a, b), rtol=1e-5, atol=1e-6)


def test_iou_of_touching_and_distant_boxes_is_zero():
    a = torch.tensor([[0, 0, 0.5, 0.5]])
    b = torch.tensor([[0.5, 0, 1, 0.5], [0.75, 0.75, 1, 1]])
    assert pairwise_iou(a, b).tolist() == [[0, 0]]


# Matching, where the paper leaves it open


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


def test_a_default_box_takes_the_object_it_overlaps_most():
    # The first two default boxes are the objects' own; the third overlaps both by more than half.
    defaults = torch.tensor([[0, 0, 1, 0.75], [0, 0, 1, 1], [0, 0, 1, 0.8125]])
    objects = [[0, 0, 1, 0.75], [0, 0, 1, 1]]
    encoder = Encoder(box_xyxy_to_cxcywh(defaults))
    assert encoder.encode(*tensors(objects, [1, 2]))[1].tolist() == [1, 2, 1]
    assert encoder.encode(*tensors(objects[::-1], [2, 1]))[1].tolist() == [1, 2, 1]


@pytest.mark.parametrize("first", [0, 1])
def test_if_two_objects_share_a_best_default_box_the_later_one_gets_it(first):
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
def test_decode_returns_what_encode_was_given(name, seed):
    boxes, labels = tensors(*ground_truth(seed))
    encoder = Encoder(make_default_boxes(name))
    loc, cls = encoder.encode(boxes, labels)
    logits = certain_logits(cls, 81)
    (found,) = encoder.decode(loc[None], logits, score_threshold=0.5, nms_threshold=1.1)
    assert len(found["boxes"]) == (cls > 0).sum()
    distance = (found["boxes"][:, None] - boxes).abs().amax(dim=2)  # (K, G)
    distance[found["labels"][:, None] != labels] = 1
    assert distance.amin(dim=1).max() < 1e-5  # each detection is an object
    assert distance.amin(dim=0).max() < 1e-5  # each object is detected


@pytest.mark.parametrize(
    "corners, survivors",
    [
        ([[-0.5, 0, 0.25, 0.5], [0, 0, 0.25, 0.5]], 2),  # IoU 1/3; equal after clipping
        ([[-1, 0, 0.25, 0.5], [-1, 0, 0.125, 0.5]], 1),  # IoU 0.9; 1/2 after clipping
    ],
)
def test_nms_sees_unclipped_boxes(corners, survivors):
    encoder = Encoder(box_xyxy_to_cxcywh(torch.tensor(corners)))
    logits = certain_logits(torch.tensor([1, 1]), 2)
    (found,) = encoder.decode(torch.zeros(1, 2, 4), logits)
    assert len(found["boxes"]) == survivors
    assert found["boxes"].min() == 0


def test_nms_takes_at_most_200_candidates_per_class():
    # The 200 best lie on one another; what comes after them is never looked at.
    defaults = torch.tensor([[0.25, 0.25, 0.1, 0.1]] * 200 + [[0.75, 0.75, 0.1, 0.1]])
    logits = torch.zeros(1, 201, 3)
    logits[0, :200, 1], logits[0, 200, 1], logits[0, 200, 2] = 5, 4, 3
    (found,) = Encoder(defaults).decode(torch.zeros(1, 201, 4), logits, score_threshold=0.2)
    assert found["labels"].tolist() == [1, 2]
    assert_close(found["boxes"], box_cxcywh_to_xyxy(defaults[[0, 200]]))


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
