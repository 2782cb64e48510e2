"""The MultiBox loss (SSD section 2.2, eq. 1-3) with hard negative mining."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn


class MultiBoxLoss(nn.Module):
    """Smooth L1 on matched default boxes, cross-entropy on those and the hardest negatives.

    per_image: normalize as NVIDIA's and uvipen's SSD-ResNet50 recipes do, each image by its own
    matched boxes, instead of the batch by all of its matched boxes (eq. 1).
    """

    def __init__(self, neg_pos_ratio=3, per_image=False):
        super().__init__()
        self.neg_pos_ratio, self.per_image = neg_pos_ratio, per_image

    def forward(self, loc, cls_logits, loc_targets, cls_targets):
        """Return loc_loss () and cls_loss (), float32; their sum is the paper's loss (alpha = 1).

        loc (B, D, 4), cls_logits (B, D, C), loc_targets (B, D, 4), cls_targets (B, D) int64 with
        0 for background. An image without a matched box adds nothing. Where several processes
        train together the batch is that of all processes: call it in each of them.
        """
        matched = cls_targets > 0  # (B, D)
        num_matched = matched.sum(dim=1)  # (B,)

        loc_loss = F.smooth_l1_loss(loc.float(), loc_targets, reduction="none").sum(dim=2)
        loc_loss = (loc_loss * matched).sum(dim=1)

        logits, labels = cls_logits.float().flatten(0, 1), cls_targets.flatten()
        cls_loss = F.cross_entropy(logits, labels, reduction="none").view_as(cls_targets)  # (B, D)
        # Hard negative mining: of each image's background boxes only those with the highest loss count,
        # three for each matched box. Matched boxes get loss 0 here: they sort last and add nothing if
        # background boxes run out.
        negatives = cls_loss.masked_fill(matched, 0).sort(dim=1, descending=True).values
        rank = torch.arange(negatives.shape[1], device=negatives.device)
        hardest = rank < self.neg_pos_ratio * num_matched[:, None]  # (B, D)
        cls_loss = (cls_loss * matched).sum(dim=1) + (negatives * hardest).sum(dim=1)  # (B,)

        if self.per_image:
            weight = 1 / num_matched.clamp(min=1) / len(matched)  # (B,)
        else:
            weight = 1 / num_matched_everywhere(num_matched)  # 1 / N of eq. 1
        return (loc_loss * weight).sum(), (cls_loss * weight).sum()


def num_matched_everywhere(num_matched):
    """Matched boxes in the batches of all processes (at least 1), divided by the number of processes.

    DistributedDataParallel averages gradients, which divides by that number once more: this undoes
    it. num_matched (B,) is this process's. The sum stays on the device, so nothing waits for it.
    """
    total = num_matched.sum().float()
    processes = 1
    if dist.is_initialized():
        dist.all_reduce(total)
        processes = dist.get_world_size()
    return total.clamp(min=1) / processes
