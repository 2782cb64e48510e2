"""The networks: SSD section 2.1 and figure 2; MobileNetV2 section 6.2 (SSDLite).

The paper's SSD300 stands on VGG-16, ours on ResNet-50: its maps have the paper's sizes, their channels are those of the
published recipe.
"""

import pytest
import torch
from samples import MODELS, forward, reference_images

from src.model import build_model

# Cells along each side of each map, and channels.
MAPS = {
    "ssd": ((38, 19, 10, 5, 3, 1), (1024, 512, 512, 256, 256, 256)),
    "ssdlite": ((19, 10, 5, 3, 2, 1), (576, 1280, 512, 256, 256, 64)),
}


@pytest.mark.parametrize("name", MODELS)
def test_both_heads_look_at_six_maps_of_the_papers_sizes(name, models):
    seen = {"loc": [], "conf": []}
    hooks = [
        head.register_forward_pre_hook(lambda _, x, seen=seen[kind]: seen.append(x[0].shape[1:]))
        for kind in seen
        for head in getattr(models[name], kind)
    ]
    forward(models[name], reference_images(1))
    for hook in hooks:
        hook.remove()
    cells, channels = MAPS[name]
    expected = [(c, n, n) for c, n in zip(channels, cells, strict=True)]
    assert seen == {"loc": expected, "conf": expected}


@pytest.mark.parametrize("name, defaults", [("ssd", 8732), ("ssdlite", 3000)])
@pytest.mark.parametrize("num_classes", [2, 21])
def test_each_default_box_gets_four_offsets_and_a_score_per_class(name, defaults, num_classes):
    # Section 2.1: (c + 4) k m n outputs for k boxes in each cell of an m x n map.
    model = build_model(name, num_classes, pretrained_backbone=False).eval()
    loc, cls_logits = forward(model, torch.zeros(1, 3, 300, 300))
    assert loc.shape == (1, defaults, 4)
    assert cls_logits.shape == (1, defaults, num_classes)
    assert loc.dtype == cls_logits.dtype == torch.float32


@pytest.mark.parametrize("name", MODELS)
def test_the_last_head_trains_the_first_convolution(name, models):
    # Section 2.1: each map is computed from the one before it, and trained through it.
    loc, _ = models[name](reference_images(1))
    (grad,) = torch.autograd.grad(loc[:, -4:].sum(), next(models[name].parameters()))
    assert grad.any() and grad.isfinite().all()


def test_ssdlite_starts_at_the_expansion_of_layer_15_and_at_the_last_layer(models):
    # MobileNetV2 section 6.2: output strides 16 and 32. Both maps end in a ReLU6; a bottleneck's own output would not.
    first, last = forward(models["ssdlite"].backbone, reference_images(1))
    assert first.shape == (1, 576, 19, 19) and last.shape == (1, 1280, 10, 10)
    for features in (first, last):
        assert features.min() == 0 and 0 < features.max() <= 6
