"""Default boxes, and the Encoder: matching before training, decoding with NMS after the network.

All boxes are relative to the image, in [0, 1]: `default_boxes` as cxcywh, objects as xyxy.
"""

import math
from dataclasses import dataclass

import torch
from torchvision.ops import nms

MATCHING_IOU = 0.5  # above it a default box is matched to an object (SSD section 2.2)
# SSD section 3.7 has 0.01 and 0.45.
SCORE_THRESHOLD = 0.01  # of what counts as a detection
NMS_THRESHOLD = 0.5  # IoU above which the weaker of two boxes of a class is removed
MAX_DETECTIONS = 200  # of an image; before NMS, of a class


@dataclass(frozen=True)
class DefaultBoxes:
    """Where a model's default boxes lie, in pixels of its input (SSD section 2.2).

    Per cell of each map: two squares, and two boxes for each further aspect ratio.
    """

    input_size: int  # pixels along each side of the image
    feature_maps: tuple  # cells along each side of a feature map
    strides: tuple  # distance of neighboring cells
    sizes: tuple  # s_k of eq. 4, one more than feature maps: the last is for the sqrt(s_k * s_(k+1)) box
    ratios: tuple  # aspect ratios other than 1; each is for itself and its inverse

    @property
    def per_cell(self):
        """Default boxes per cell of each map."""
        return tuple(2 + 2 * len(ratios) for ratios in self.ratios)


DEFAULT_BOXES = {
    # The paper's COCO sizes (section 3.4 and its code): 0.07 for the first map, then 0.15 to 1.05.
    "ssd": DefaultBoxes(
        input_size=300,
        feature_maps=(38, 19, 10, 5, 3, 1),
        strides=(8, 16, 32, 64, 100, 300),
        sizes=(21, 45, 99, 153, 207, 261, 315),
        ratios=((2,), (2, 3), (2, 3), (2, 3), (2,), (2,)),
    ),
    # MobileNetV2 section 6.2 names the maps; sizes are 0.2 to 0.95 (eq. 4), and 1.1 for the last.
    "ssdlite": DefaultBoxes(
        input_size=300,
        feature_maps=(19, 10, 5, 3, 2, 1),
        strides=(16, 32, 64, 100, 150, 300),
        sizes=(60, 105, 150, 195, 240, 285, 330),
        ratios=((2, 3),) * 6,
    ),
}


def make_default_boxes(name):
    """Return the default boxes of model `name`, (D, 4) float32 cxcywh in [0, 1].

    Order, the same as the heads': map, then shape, then row, then column. SSD section 2.2.
    """
    constants = DEFAULT_BOXES[name]
    boxes = []
    for k, (cells, stride) in enumerate(zip(constants.feature_maps, constants.strides, strict=True)):
        size, next_size = constants.sizes[k], constants.sizes[k + 1]
        shapes = [(size, size), (math.sqrt(size * next_size),) * 2]
        for ratio in constants.ratios[k]:
            wide, narrow = size * math.sqrt(ratio), size / math.sqrt(ratio)
            shapes += [(wide, narrow), (narrow, wide)]
        for width, height in shapes:
            for row in range(cells):
                for column in range(cells):
                    # The paper's text puts the centers at (i + 0.5) / |f_k|. Here, as in its code: at
                    # (i + 0.5) strides, which differs where a stride does not divide the input size.
                    boxes.append(((column + 0.5) * stride, (row + 0.5) * stride, width, height))
    # Clamps center, width and height, not corners: published weights expect it.
    return (torch.tensor(boxes, dtype=torch.float64) / constants.input_size).clamp(0, 1).float()


def box_cxcywh_to_xyxy(boxes):
    """(..., 4) cxcywh -> (..., 4) xyxy."""
    return torch.cat([boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2], -1)


def box_xyxy_to_cxcywh(boxes):
    """(..., 4) xyxy -> (..., 4) cxcywh."""
    return torch.cat([(boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]], -1)


def pairwise_iou(a, b):
    """Jaccard overlap of every box of `a` (N, 4) with every box of `b` (M, 4), xyxy: (N, M)."""
    # Each of b's coordinates as one contiguous row: several times faster than (N, M, 2) tensors.
    ax1, ay1, ax2, ay2 = a.T.contiguous().unsqueeze(-1)
    bx1, by1, bx2, by2 = b.T.contiguous()
    width = (torch.minimum(ax2, bx2) - torch.maximum(ax1, bx1)).clamp_(min=0)
    height = (torch.minimum(ay2, by2) - torch.maximum(ay1, by1)).clamp_(min=0)
    intersection = width.mul_(height)
    union = (ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - intersection
    return intersection / union


class Encoder:
    """Turns objects into training targets, and the network's output into detections.

    default_boxes: (D, 4) float32 cxcywh. variances: divisors of the offsets, (center, size). The
    paper's text has none; its code has 0.1 and 0.2, as do most implementations.
    """

    def __init__(self, default_boxes, variances=(0.1, 0.2)):
        self.default_boxes = default_boxes
        self.corners = box_cxcywh_to_xyxy(default_boxes)
        self.variances = variances

    def encode(self, boxes, labels):
        """Match default boxes to objects (SSD section 2.2) and return their targets.

        boxes (G, 4) float32 xyxy in [0, 1], labels (G,) int64 -> loc_targets (D, 4) float32,
        cls_targets (D,) int64, both 0 where a default box has no object (0 is background).
        A default box gets the object it overlaps most, if their IoU exceeds 0.5. Each object gets the
        default box it overlaps most, whatever the IoU; if two objects share a best box, the later one
        gets it.
        """
        loc_targets = torch.zeros_like(self.default_boxes)
        cls_targets = torch.zeros(len(self.default_boxes), dtype=torch.int64)
        if len(boxes) == 0:
            return loc_targets, cls_targets
        iou = pairwise_iou(boxes, self.corners)  # (G, D)
        best_iou, owner = iou.max(dim=0)  # (D,): each default box's object
        for g, d in enumerate(iou.argmax(dim=1).tolist()):  # each object's default box
            owner[d], best_iou[d] = g, 1.0  # 1.0: matched whatever the IoU
        matched = (best_iou > MATCHING_IOU).nonzero().squeeze(1)  # (M,): which default boxes have an object
        owner = owner[matched]
        # Eq. 2: offsets of the center relative to the default box's size, and the logarithm of the ratio of sizes.
        objects, defaults = box_xyxy_to_cxcywh(boxes[owner]), self.default_boxes[matched]
        offsets = (objects[:, :2] - defaults[:, :2]) / defaults[:, 2:] / self.variances[0]
        scales = (objects[:, 2:] / defaults[:, 2:]).log() / self.variances[1]
        loc_targets[matched] = torch.cat([offsets, scales], dim=1)
        cls_targets[matched] = labels[owner]
        return loc_targets, cls_targets

    def fits(self, boxes):
        """Which of boxes (G, 4) xyxy overlap a default box enough to be matched: (G,) bool."""
        corners = self.corners.cpu()
        return torch.cat([pairwise_iou(part, corners).amax(dim=1) for part in boxes.split(100)]) > MATCHING_IOU

    def decode(
        self,
        loc,
        cls_logits,
        score_threshold=SCORE_THRESHOLD,
        nms_threshold=NMS_THRESHOLD,
        max_detections=MAX_DETECTIONS,
    ):
        """Turn raw outputs into detections (SSD section 2.2 and "inference" of section 3.7).

        loc (B, D, 4), cls_logits (B, D, C) -> list of B dicts: boxes (K, 4) xyxy in [0, 1],
        labels (K,) int64 from 1, scores (K,) descending; K <= max_detections. Candidates score
        above `score_threshold`. For each class, NMS takes its best `max_detections` candidates and
        removes those whose IoU with a better one exceeds `nms_threshold`; boxes are clipped afterwards.
        """
        return [
            self._decode_image(*image, score_threshold, nms_threshold, max_detections)
            for image in zip(loc.float(), cls_logits.float(), strict=True)
        ]

    def _decode_image(self, loc, logits, score_threshold, nms_threshold, max_detections):
        # 1. Discard boxes that are background, which most are, before the costly softmax:
        # softmax(c) > t needs logit(c) - logit(background) > log(t).
        log_threshold = math.log(score_threshold) if score_threshold > 0 else -math.inf
        kept = (logits[:, 1:].amax(1) - logits[:, 0] > log_threshold).nonzero().squeeze(1)  # (N,)
        # 2. Softmax, then only the classes that score above the threshold somewhere: few do.
        scores = logits[kept].softmax(dim=1)[:, 1:].T  # (C - 1, N)
        present = (scores > score_threshold).any(dim=1).nonzero().squeeze(1)  # (K,): which classes
        # 3. The best candidates of each class, in descending order.
        scores, order = scores[present].topk(min(max_detections, len(kept)), dim=1)  # (K, 200 at most) both
        counts = (scores > score_threshold).sum(dim=1).tolist()
        boxes = self.apply_offsets(loc[kept], kept)  # (N, 4)
        # 4. NMS class by class.
        survivors = [(boxes.new_zeros(0, 4), order.new_zeros(0), scores.new_zeros(0))]
        for row, (label, count) in enumerate(zip((present + 1).tolist(), counts, strict=True)):
            class_boxes, class_scores = boxes[order[row, :count]], scores[row, :count]
            keep = nms(class_boxes, class_scores, nms_threshold)
            labels = torch.full_like(keep, label)
            survivors.append((class_boxes[keep], labels, class_scores[keep]))
        boxes, labels, scores = (torch.cat(parts) for parts in zip(*survivors, strict=True))
        # 5. The best of all classes.
        scores, best = scores.sort(descending=True, stable=True)
        scores, best = scores[:max_detections], best[:max_detections]
        return {"boxes": boxes[best].clamp(0, 1), "labels": labels[best], "scores": scores}

    def apply_offsets(self, loc, kept=slice(None)):
        """The inverse of what `encode` writes: loc (N, 4) of boxes `kept` (N,) -> (N, 4) xyxy."""
        defaults = self.default_boxes.to(loc.device)[kept]
        centers = defaults[:, :2] + loc[:, :2] * self.variances[0] * defaults[:, 2:]
        sizes = defaults[:, 2:] * (loc[:, 2:] * self.variances[1]).exp()
        return box_cxcywh_to_xyxy(torch.cat([centers, sizes], dim=1))
