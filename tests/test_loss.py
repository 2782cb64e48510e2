"""src.loss against the reference values, and where the paper leaves it open.

What the paper states is in paper/test_training_objective.py.
"""

import json
from pathlib import Path

import pytest
import torch
from reference.inputs import ground_truth, predictions
from samples import random_batch

from src.boxes import Encoder, make_default_boxes
from src.loss import MultiBoxLoss

REFERENCE = Path(__file__).parent / "reference"


@pytest.mark.parametrize("name", ["ssd", "ssdlite"])
@pytest.mark.parametrize("seed", range(4))
def test_loss_per_image_equals_the_reference(name, seed):
    cases = json.loads((REFERENCE / "loss.json").read_text())
    (expected,) = (case["loss"] for case in cases if (case["model"], case["seed"]) == (name, seed))
    encoder = Encoder(make_default_boxes(name))
    batch = []
    for b in range(3):
        boxes, labels = (torch.from_numpy(part) for part in ground_truth(3 * seed + b))
        if seed % 2 == 1 and b == 2:
            boxes, labels = boxes[:0], labels[:0]
        outputs = predictions(3 * seed + b, len(encoder.default_boxes))
        batch.append((*map(torch.from_numpy, outputs), *encoder.encode(boxes, labels)))
    criterion = MultiBoxLoss(per_image=True)
    loc_loss, cls_loss = criterion(*map(torch.stack, zip(*batch, strict=True)))
    assert (loc_loss + cls_loss).item() == pytest.approx(expected, rel=1e-4)


def test_neg_pos_ratio_is_the_number_of_negatives_per_positive():
    batch = random_batch((4,))
    sum(MultiBoxLoss(neg_pos_ratio=1)(*batch)).backward()
    assert (batch[1].grad.abs().sum(dim=2) > 0).sum() == 8


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_outputs_are_summed_in_float32(half):
    loc, cls_logits, loc_targets, cls_targets = random_batch((30, 2), num_defaults=4000)
    loc, cls_logits = loc.detach().to(half), cls_logits.detach().to(half)
    losses = MultiBoxLoss()(loc, cls_logits, loc_targets, cls_targets)
    expected = MultiBoxLoss()(loc.float(), cls_logits.float(), loc_targets, cls_targets)
    for value, wanted in zip(losses, expected, strict=True):
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(wanted.item(), rel=1e-5)
