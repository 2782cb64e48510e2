"""src.loss against the SSD paper (section 2.2, eq. 1-3), worked by hand, and the reference."""

import json
from math import log
from pathlib import Path

import pytest
import torch
from reference.inputs import ground_truth, predictions

from src.boxes import Encoder, make_default_boxes
from src.loss import MultiBoxLoss

REFERENCE = Path(__file__).parent / "reference"


def random_batch(matched, num_defaults=60, num_classes=5, seed=0):
    """loc, cls_logits (wanting gradients) and targets; image b has matched[b] matched boxes."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(matched), num_defaults)
    loc, loc_targets = torch.randn(2, *shape, 4, generator=generator)
    cls_logits = torch.randn(*shape, num_classes, generator=generator)
    cls_targets = torch.zeros(shape, dtype=torch.int64)
    for b, count in enumerate(matched):
        chosen = torch.randperm(num_defaults, generator=generator)[:count]
        cls_targets[b, chosen] = torch.randint(1, num_classes, (count,), generator=generator)
    return loc.requires_grad_(), cls_logits.requires_grad_(), loc_targets, cls_targets


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


def test_loss_by_hand():
    # Logits are logarithms of odds: a row's loss is -log of its target's share.
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


def test_mining_takes_the_three_hardest_negatives_a_positive():
    # SSD section 2.2: "the ratio between the negatives and positives is at most 3:1".
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


def test_neg_pos_ratio():
    batch = random_batch((4,))
    sum(MultiBoxLoss(neg_pos_ratio=1)(*batch)).backward()
    assert (batch[1].grad.abs().sum(dim=2) > 0).sum() == 8


def test_a_positive_is_never_mined_when_negatives_run_out():
    # 50 of 60 match: only 10 of the 150 wanted negatives exist, and no matched box counts twice.
    loc, cls_logits, loc_targets, cls_targets = random_batch((50,))
    _, cls_loss = MultiBoxLoss()(loc, cls_logits, loc_targets, cls_targets)
    log_p = cls_logits.detach().log_softmax(dim=2)[0]
    expected = -log_p[torch.arange(60), cls_targets[0]].sum() / 50
    assert cls_loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_an_image_without_objects_adds_no_loss_and_no_gradient():
    # SSD section 2.2: N = 0 makes the loss 0.
    loc, cls_logits, loc_targets, cls_targets = random_batch((6, 0))
    losses = MultiBoxLoss()(loc, cls_logits, loc_targets, cls_targets)
    sum(losses).backward()
    assert not loc.grad[1].any() and not cls_logits.grad[1].any()
    first = MultiBoxLoss()(loc[:1], cls_logits[:1], loc_targets[:1], cls_targets[:1])
    assert [value.item() for value in losses] == pytest.approx([v.item() for v in first])


def test_a_batch_without_any_object_has_no_loss_and_goes_backward():
    loc, cls_logits, loc_targets, cls_targets = random_batch((0, 0))
    loc_loss, cls_loss = MultiBoxLoss()(loc, cls_logits, loc_targets, cls_targets)
    assert loc_loss.item() == cls_loss.item() == 0
    (loc_loss + cls_loss).backward()
    assert torch.equal(loc.grad, torch.zeros_like(loc))
    assert torch.equal(cls_logits.grad, torch.zeros_like(cls_logits))


def test_a_batch_weighs_its_images_by_their_matched_boxes():
    matched = (3, 0, 20, 1)
    batch = random_batch(matched)
    together = MultiBoxLoss()(*batch)
    alone = [MultiBoxLoss()(*(part[b : b + 1] for part in batch)) for b in range(4)]
    for k in range(2):
        total = sum(n * losses[k].item() for n, losses in zip(matched, alone, strict=True))
        assert together[k].item() == pytest.approx(total / 24, rel=1e-5)


def test_per_image_a_batch_is_the_mean_of_its_images():
    batch = random_batch((3, 0, 20, 1))
    together = MultiBoxLoss(per_image=True)(*batch)
    alone = [MultiBoxLoss()(*(part[b : b + 1] for part in batch)) for b in range(4)]
    for k in range(2):
        mean = sum(losses[k].item() for losses in alone) / 4
        assert together[k].item() == pytest.approx(mean, rel=1e-5)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_outputs_are_summed_in_float32(half):
    loc, cls_logits, loc_targets, cls_targets = random_batch((30, 2), num_defaults=4000)
    loc, cls_logits = loc.detach().to(half), cls_logits.detach().to(half)
    losses = MultiBoxLoss()(loc, cls_logits, loc_targets, cls_targets)
    expected = MultiBoxLoss()(loc.float(), cls_logits.float(), loc_targets, cls_targets)
    for value, wanted in zip(losses, expected, strict=True):
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(wanted.item(), rel=1e-5)
