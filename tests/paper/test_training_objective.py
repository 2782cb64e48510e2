"""The loss: SSD section 2.2, "Training objective", eq. 1 to 3, and "Hard negative mining"."""

from math import log

import pytest
import torch
from samples import random_batch, tensors

from src.boxes import Encoder
from src.loss import MultiBoxLoss


def test_location_targets_are_the_offsets_of_equation_2():
    # Center moved by (0.01, -0.02), sizes 5/4 and 3/4 of the default box. The paper's code divides the offsets by
    # variances of 0.1 and 0.2, which eq. 2 does not have.
    encoder = Encoder(torch.tensor([[0.5, 0.5, 0.2, 0.4]]))
    loc, cls = encoder.encode(*tensors([[0.385, 0.33, 0.635, 0.63]], [7]))
    expected = [0.01 / 0.2 / 0.1, -0.02 / 0.4 / 0.1, log(1.25) / 0.2, log(0.75) / 0.2]
    assert expected == pytest.approx([0.5, -0.5, 1.115718, -1.438410], abs=1e-6)
    assert loc[0].tolist() == pytest.approx(expected, abs=1e-5)
    assert cls.tolist() == [7]


def test_loss_is_that_of_equations_1_to_3_worked_by_hand():
    # Logits are logarithms of odds: by eq. 3, a row's loss is -log of its target's share.
    odds = torch.ones(2, 6, 3)
    cls_targets = torch.zeros(2, 6, dtype=torch.int64)
    loc, loc_targets = torch.zeros(2, 2, 6, 4)
    loc[:, 5] = 50.0  # not matched, so it must not count

    # Image 0: one match, so the three hardest of five: log 3, log 2, log 4/3.
    cls_targets[0, 1] = 2
    odds[0, 1, 2] = 2  # 2 of 4: log 2
    odds[0, [2, 3, 4, 5], 0] = torch.tensor([198.0, 2, 18, 6])  # log 100/99, 2, 10/9, 4/3
    loc[0, 1] = torch.tensor([0.5, 2, 0, 1])
    loc_targets[0, 1] = torch.tensor([0, 0, 0, 2.0])  # smooth L1: 1/8, 3/2, 0, 1/2
    cls_0 = log(2) + log(3) + log(2) + log(4 / 3)
    loc_0 = 1 / 8 + 3 / 2 + 0 + 1 / 2

    # Image 1: two matches want six negatives but there are four.
    cls_targets[1, 0], cls_targets[1, 4] = 1, 2
    odds[1, 4, 1] = 8  # 1 of 10 for its class: log 10
    odds[1, [1, 2, 3, 5], 0] = torch.tensor([2.0, 6, 18, 198])
    loc[1, 4, 0] = -3  # 5/2
    cls_1 = log(3) + log(10) + log(2) + log(4 / 3) + log(10 / 9) + log(100 / 99)
    loc_1 = 5 / 2

    batch = loc, odds.log(), loc_targets, cls_targets
    loc_loss, cls_loss = MultiBoxLoss()(*batch)  # eq. 1: N = 1 + 2
    assert loc_loss.item() == pytest.approx((loc_0 + loc_1) / 3, rel=1e-5)
    assert cls_loss.item() == pytest.approx((cls_0 + cls_1) / 3, rel=1e-5)
    loc_loss, cls_loss = MultiBoxLoss(per_image=True)(*batch)  # N = 1, and N = 2; then the mean
    assert loc_loss.item() == pytest.approx((loc_0 + loc_1 / 2) / 2, rel=1e-5)
    assert cls_loss.item() == pytest.approx((cls_0 + cls_1 / 2) / 2, rel=1e-5)


def test_n_of_equation_1_counts_the_matched_boxes_of_the_whole_batch():
    matched = (3, 0, 20, 1)
    batch = random_batch(matched)
    together = MultiBoxLoss()(*batch)
    alone = [MultiBoxLoss()(*(part[b : b + 1] for part in batch)) for b in range(4)]
    for k in range(2):
        total = sum(n * losses[k].item() for n, losses in zip(matched, alone, strict=True))
        assert together[k].item() == pytest.approx(total / 24, rel=1e-5)


def test_an_image_without_objects_adds_no_loss_and_no_gradient():
    loc, cls_logits, loc_targets, cls_targets = random_batch((6, 0))
    losses = MultiBoxLoss()(loc, cls_logits, loc_targets, cls_targets)
    sum(losses).backward()
    assert not loc.grad[1].any() and not cls_logits.grad[1].any()
    first = MultiBoxLoss()(loc[:1], cls_logits[:1], loc_targets[:1], cls_targets[:1])
    assert [value.item() for value in losses] == pytest.approx([v.item() for v in first])


def test_without_a_matched_box_the_loss_is_0():
    # "If N = 0, we set the loss to 0"; its gradient is 0, too.
    loc, cls_logits, loc_targets, cls_targets = random_batch((0, 0))
    loc_loss, cls_loss = MultiBoxLoss()(loc, cls_logits, loc_targets, cls_targets)
    assert loc_loss.item() == cls_loss.item() == 0
    (loc_loss + cls_loss).backward()
    assert torch.equal(loc.grad, torch.zeros_like(loc))
    assert torch.equal(cls_logits.grad, torch.zeros_like(cls_logits))


def test_the_three_hardest_negatives_per_positive_are_used():
    # "the ratio between the negatives and positives is at most 3:1"
    matched = (5, 1, 9)
    loc, cls_logits, loc_targets, cls_targets = random_batch(matched)
    with torch.no_grad():  # the positives' losses are the highest of all: not to be mined
        cls_logits[cls_targets > 0] += 20 * torch.eye(5)[0]
    sum(MultiBoxLoss()(loc, cls_logits, loc_targets, cls_targets)).backward()
    background_loss = -cls_logits.detach().log_softmax(dim=2)[..., 0]
    for b, count in enumerate(matched):
        positives = set(cls_targets[b].nonzero().flatten().tolist())
        order = background_loss[b].argsort(descending=True).tolist()
        hardest = [d for d in order if d not in positives][: 3 * count]
        used = cls_logits.grad[b].abs().sum(dim=1).nonzero().flatten().tolist()
        assert set(used) == positives | set(hardest)
        assert len(used) == 4 * count
        moved = loc.grad[b].abs().sum(dim=1).nonzero().flatten().tolist()
        assert set(moved) == positives
