"""The MultiBox loss (SSD section 2.2, eq. 1-3) with hard negative mining."""

import torch
import torch.nn.functional as F
from torch import nn


class MultiBoxLoss(nn.Module):
    """Smooth L1 on matched default boxes, cross-entropy on those and the hardest negatives."""

    def __init__(self, neg_pos_ratio=3):
        super().__init__()
        self.neg_pos_ratio = neg_pos_ratio

    def forward(self, loc, cls_logits, loc_targets, cls_targets):
        """Return loc_loss () and cls_loss (), float32; their sum is the paper's loss (alpha = 1).

        loc (B, D, 4), cls_logits (B, D, C), loc_targets (B, D, 4), cls_targets (B, D) int64 with
        0 for background. Paper: sum over the batch / matched boxes of the batch. Here: each image
        by its own matched boxes, then the mean, as both published recipes do. An image without a
        matched box adds nothing.
        """
        matched = cls_targets > 0  # (B, D)
        num_matched = matched.sum(dim=1)  # (B,)
        share = 1 / num_matched.clamp(min=1)  # N of eq. 1

        loc_loss = F.smooth_l1_loss(loc.float(), loc_targets, reduction="none").sum(dim=2)
        loc_loss = (loc_loss * matched).sum(dim=1)

        cls_loss = F.cross_entropy(
            cls_logits.float().flatten(0, 1), cls_targets.flatten(), reduction="none"
        ).view_as(cls_targets)
        # Hard negative mining: sorted by loss, only the first 3 N background boxes count. Matched
        # boxes are 0 in that list, so that where it runs out of background nothing is added.
        negatives = cls_loss.masked_fill(matched, 0).sort(dim=1, descending=True).values
        rank = torch.arange(negatives.shape[1], device=negatives.device)
        hardest = rank < self.neg_pos_ratio * num_matched[:, None]  # (B, D)
        cls_loss = (cls_loss * matched).sum(dim=1) + (negatives * hardest).sum(dim=1)
        return (loc_loss * share).mean(), (cls_loss * share).mean()
