"""Detections: SSD section 3.7, "Inference time".

A confidence threshold of 0.01, then NMS per class, then the best 200 detections of the image. The paper's NMS removes
boxes with a jaccard overlap (IoU) above 0.45; the default here is 0.5, as in the published recipe.
"""

import math

import pytest
import torch
from samples import certain_logits
from torch.testing import assert_close

from src.boxes import Encoder, box_xyxy_to_cxcywh


def test_only_scores_above_0_01_count():
    defaults = torch.tensor([[0.2, 0.2, 0.1, 0.1], [0.8, 0.8, 0.1, 0.1]])
    scores = torch.tensor([0.009, 0.011])
    logits = torch.stack([1 - scores, scores], dim=1).log()[None]
    (found,) = Encoder(defaults).decode(torch.zeros(1, 2, 4), logits)
    assert found["scores"].tolist() == pytest.approx([0.011])


@pytest.mark.parametrize("nms_threshold, survivors", [(0.5, 2), (0.49, 1)])
def test_nms_removes_a_box_whose_iou_with_a_better_one_exceeds_the_threshold(nms_threshold, survivors):
    encoder = Encoder(box_xyxy_to_cxcywh(torch.tensor([[0, 0, 0.5, 0.5], [0, 0, 0.5, 1]])))  # IoU 1/2
    logits = certain_logits(torch.tensor([1, 1]), 2)
    (found,) = encoder.decode(torch.zeros(1, 2, 4), logits, nms_threshold=nms_threshold)
    assert len(found["boxes"]) == survivors


def test_nms_treats_each_class_on_its_own():
    encoder = Encoder(torch.tensor([[0.5, 0.5, 0.4, 0.4]] * 3))
    logits = certain_logits(torch.tensor([2, 1, 2]), 3)
    (found,) = encoder.decode(torch.zeros(1, 3, 4), logits)
    assert sorted(found["labels"].tolist()) == [1, 2]


def test_the_best_200_detections_of_an_image_are_kept():
    cells = torch.arange(400)
    centers = torch.stack([(cells % 20 + 0.5) / 20, (cells // 20 + 0.5) / 20], dim=1)
    encoder = Encoder(torch.cat([centers, torch.full((400, 2), 0.04)], dim=1))
    logits = torch.randn(1, 400, 3, generator=torch.Generator().manual_seed(2))
    (found,) = encoder.decode(torch.zeros(1, 400, 4), logits)
    best = logits[0].softmax(dim=1)[:, 1:].flatten().sort(descending=True).values[:200]
    assert_close(found["scores"], best)
    (few,) = encoder.decode(torch.zeros(1, 400, 4), logits, max_detections=7)
    assert_close(few["scores"], best[:7])


def python_iou(a, b):
    width = max(0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0, min(a[3], b[3]) - max(a[1], b[1]))
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return width * height / (sum(areas) - width * height)


def python_decode(defaults, loc, logits, score_threshold, nms_threshold):
    """Section 3.7 on lists of floats: [(score, label, box)], best first.

    The paper sets no limit to what enters NMS; here it is the best 200 candidates of each class.
    """
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
def test_detections_are_those_of_the_section_in_plain_python(score_threshold, nms_threshold):
    generator = torch.Generator().manual_seed(1)
    centers, sizes = torch.rand(2, 400, 2, generator=generator)
    defaults = torch.cat([centers, 0.05 + 0.4 * sizes], dim=1)
    loc = torch.randn(1, 400, 4, generator=generator)
    logits = 2 * torch.randn(1, 400, 5, generator=generator)
    (found,) = Encoder(defaults).decode(loc, logits, score_threshold, nms_threshold)
    lists = (tensor.double().tolist() for tensor in (defaults, loc[0], logits[0]))
    scores, labels, boxes = zip(*python_decode(*lists, score_threshold, nms_threshold), strict=True)
    assert found["labels"].tolist() == list(labels)
    assert_close(found["boxes"], torch.tensor(boxes), rtol=0, atol=1e-5)
    assert_close(found["scores"], torch.tensor(scores), rtol=0, atol=1e-5)
