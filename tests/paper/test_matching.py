"""Matching: SSD section 2.2, "Matching strategy".

Each object is matched to the default box with the best jaccard overlap (IoU); then every default box whose IoU with an
object is higher than 0.5 is matched, too.
"""

import pytest
import torch
from samples import tensors
from torchvision.ops import box_iou

from src.boxes import Encoder, box_cxcywh_to_xyxy, box_xyxy_to_cxcywh, make_default_boxes


@pytest.mark.parametrize("name", ["ssd", "ssdlite"])
def test_every_object_gets_its_best_default_box_whatever_their_iou(name):
    objects = [[0.1, 0.1, 0.11, 0.11], [0.5, 0.5, 0.99, 0.51], [0.7, 0.02, 0.71, 0.4]]
    boxes, labels = tensors(objects, [1, 2, 3])
    defaults = make_default_boxes(name)
    best, index = box_iou(boxes, box_cxcywh_to_xyxy(defaults)).max(dim=1)
    assert (best < 0.5).all()
    cls = Encoder(defaults).encode(boxes, labels)[1]
    assert cls[index].tolist() == [1, 2, 3]
    assert (cls > 0).sum() == 3


def test_a_default_box_is_matched_if_its_iou_exceeds_one_half():
    # "higher than a threshold (0.5)": the object's IoU with the second default box is exactly 1/2, then a little more.
    encoder = Encoder(box_xyxy_to_cxcywh(torch.tensor([[0, 0, 0.5, 0.5], [0, 0, 0.5, 1]])))
    assert encoder.encode(*tensors([[0, 0, 0.5, 0.5]], [3]))[1].tolist() == [3, 0]
    assert encoder.encode(*tensors([[0, 0, 0.5, 0.515625]], [3]))[1].tolist() == [3, 3]
