"""src.model against the published checkpoint's names and the reference values; gradients, downloads, layouts.

What the papers state is in paper/test_networks.py.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from samples import MODELS, forward, reference_images, reference_network
from torch import nn
from torch.testing import assert_close

from src.boxes import Encoder, make_default_boxes
from src.model import build_model, freeze

REFERENCE = Path(__file__).parent / "reference"
# Cells along each side of each map, default boxes per cell, and distance of neighboring cells in pixels.
MAPS = {
    "ssd": ((38, 19, 10, 5, 3, 1), (4, 6, 6, 6, 4, 4), (8, 16, 32, 64, 100, 300)),
    "ssdlite": ((19, 10, 5, 3, 2, 1), (6,) * 6, (16, 32, 64, 100, 150, 300)),
}


def test_ssd_parameters_are_those_of_the_published_checkpoints(models):
    published = json.loads((REFERENCE / "ssd_resnet50_state_dict.json").read_text())
    own = {key: list(value.shape) for key, value in models["ssd"].state_dict().items()}
    assert own == published


def test_ssd_forward_equals_the_reference(models):
    reference = np.load(REFERENCE / "forward.npz")
    loc, logits = forward(models["ssd"], reference_images(1))
    index = torch.from_numpy(reference["index"])
    assert_close(loc[0, index], torch.from_numpy(reference["0_loc"]), rtol=0, atol=1e-3)
    assert_close(logits[0, index], torch.from_numpy(reference["0_logits"]), rtol=0, atol=1e-3)
    (found,) = Encoder(make_default_boxes("ssd")).decode(loc, logits, score_threshold=0.05)
    assert found["labels"][:20].tolist() == reference["0_labels"].tolist()
    for key in ("boxes", "scores"):
        expected = torch.from_numpy(reference[f"0_{key}"]).clamp(0, 1)
        assert_close(found[key][:20], expected, rtol=0, atol=1e-3)


class ChannelRowColumn(nn.Module):
    """Stands in for a head: each output says from which channel, row and column it came."""

    def __init__(self, channels):
        super().__init__()
        self.channels = channels

    def forward(self, x):
        n = x.shape[2]
        parts = torch.meshgrid(torch.arange(self.channels), torch.arange(n), torch.arange(n), indexing="ij")
        code = parts[0] * 10000 + parts[1] * 100 + parts[2]
        return code.float().expand(len(x), -1, -1, -1)


@pytest.mark.parametrize("name", MODELS)
def test_outputs_lie_at_their_default_boxes(name):
    # reference/README.md: channel = coordinate * k + box (or class * k + box), and default boxes
    # run shape-major, then row, then column. A box's cell is told by its center.
    model = build_model(name, 3, pretrained_backbone=False).eval()
    for head, k in enumerate(MAPS[name][1]):
        model.loc[head], model.conf[head] = ChannelRowColumn(4 * k), ChannelRowColumn(3 * k)
    loc, cls_logits = forward(model, torch.zeros(2, 3, 300, 300))
    defaults = torch.from_numpy(np.load(REFERENCE / f"default_boxes_{name}.npy"))
    start = 0
    for cells, k, step in zip(*MAPS[name], strict=True):
        here = slice(start, start + cells * cells * k)
        column, row = (defaults[here, :2] * 300 / step - 0.5).round().T
        shape = torch.arange(k).repeat_interleave(cells * cells)
        for output, channels in ((loc, 4), (cls_logits, 3)):
            for part in range(channels):
                expected = (part * k + shape) * 10000 + row * 100 + column
                assert torch.equal(output[0, here, part], expected)
                assert torch.equal(output[1, here, part], expected)
        start = here.stop
    assert start == len(defaults)


@pytest.mark.parametrize(
    "name, head, shape, size",
    [
        ("ssd", 1, 4, (45 * 3**0.5, 45 / 3**0.5)),  # aspect ratio 3 on the 19 x 19 map
        ("ssdlite", 5, 3, (285 / 2**0.5, 285 * 2**0.5)),  # ratio 1/2 on the single cell
    ],
)
def test_a_class_bias_speaks_for_its_shape_alone(name, head, shape, size):
    model = build_model(name, 7, pretrained_backbone=False).eval()
    k = MAPS[name][1][head]
    for conf in model.conf:
        last = conf if isinstance(conf, nn.Conv2d) else conf[-1]
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
    last = model.conf[head] if isinstance(model.conf[head], nn.Conv2d) else model.conf[head][-1]
    last.bias.data[5 * k + shape] = 1
    _, cls_logits = forward(model, reference_images(1))
    defaults = torch.from_numpy(np.load(REFERENCE / f"default_boxes_{name}.npy"))
    expected = torch.zeros(len(defaults), 7)
    wanted = torch.tensor(size).div(300).clamp(max=1)
    expected[(defaults[:, 2:] - wanted).abs().amax(dim=1) < 1e-5, 5] = 1
    assert expected.sum() == MAPS[name][0][head] ** 2
    assert_close(cls_logits[0], expected)


@pytest.mark.parametrize("name", MODELS)
def test_gradient_reaches_every_parameter(name):
    torch.manual_seed(0)
    model = reference_network(name, 4).train()  # a new one's zero gammas would hold it up for one step
    loc, cls_logits = model(reference_images(3))
    # A weight of its own for every output; the loss alone leaves heads without a match untouched.
    ((loc * torch.randn_like(loc)).sum() + (cls_logits * torch.randn_like(cls_logits)).sum()).backward()
    still = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert still == []
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_from_scratch_residual_blocks_start_as_the_identity():
    torch.manual_seed(0)
    model = build_model("ssd", 4, pretrained_backbone=False).train()
    block = model.feature_extractor.feature_extractor[-1][1]
    x = torch.rand(2, 1024, 8, 8)
    assert_close(block(x), x, rtol=0, atol=0)


def test_ssdlites_first_head_trains_the_backbone():
    torch.manual_seed(0)
    model = build_model("ssdlite", 4, pretrained_backbone=False).train()
    loc, _ = model(reference_images(2))
    (loc[:, : 19 * 19 * 6] * torch.randn(2, 2166, 4)).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.backbone.to_stride_16.parameters())
    assert all(p.grad is None or not p.grad.any() for p in model.backbone.to_stride_32.parameters())


def test_ssds_extra_blocks_end_in_an_unbounded_relu(models):
    for block, c in zip(models["ssd"].additional_blocks, (1024, 512, 512, 256, 256), strict=True):
        out = forward(block, 100 * torch.rand(1, c, 5, 5))
        assert out.min() == 0 and out.max() > 6


@pytest.fixture
def downloads(monkeypatch):
    """Addresses of the files that were asked for; none is fetched."""
    asked = []

    def refuse(url, *args, **kwargs):
        asked.append(url.rsplit("/", 1)[-1])
        raise ConnectionError("no network in tests")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", refuse)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    return asked


@pytest.mark.parametrize("name, file", [("ssd", "resnet50-11ad3fa6.pth"), ("ssdlite", "mobilenet_v2-7ebf99e0.pth")])
def test_only_a_pretrained_backbone_is_downloaded(name, file, downloads):
    build_model(name, 2, pretrained_backbone=False)
    assert downloads == []
    with pytest.raises(ConnectionError):
        build_model(name, 2)  # the recipe's IMAGENET1K_V2, by its file
    assert downloads == [file]


@pytest.mark.parametrize("name", MODELS)
def test_a_batch_equals_its_images_and_channels_last_equals_contiguous(name, models):
    images = reference_images(2)
    alone = [forward(models[name], x[None]) for x in images]
    expected = [torch.cat(parts) for parts in zip(*alone, strict=True)]
    assert not torch.equal(expected[1][0], expected[1][1])
    for layout in (torch.contiguous_format, torch.channels_last):
        model = models[name].to(memory_format=layout)
        output = forward(model, images.contiguous(memory_format=layout))
        assert_close(list(output), expected, rtol=1e-4, atol=1e-4)
    models[name].to(memory_format=torch.contiguous_format)


def test_ssdlites_relu6_copies_nothing_in_training_and_gives_the_same_gradients():
    images = torch.randn(2, 3, 300, 300)
    gradients = []
    clones = []
    for in_place in (False, True):
        torch.manual_seed(0)
        network = build_model("ssdlite", 4, pretrained_backbone=False).train()
        if in_place:
            for module in network.modules():
                if isinstance(module, nn.ReLU6):
                    module.inplace = True
        with torch.profiler.profile() as profile:
            sum(output.square().mean() for output in network(images)).backward()
        gradients.append([p.grad for p in network.parameters()])
        clones.append(sum(event.count for event in profile.key_averages() if event.key == "aten::clone"))
    assert clones[1] - clones[0] == 53  # each ReLU6 of the network
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize("name", MODELS)
def test_freeze_keeps_the_backbone_up_to_stride_8(name):
    network = build_model(name, 3, pretrained_backbone=False)
    freeze(network)
    assert network.first_layers()(torch.zeros(1, 3, 300, 300)).shape[2:] == (38, 38)
    frozen = {key for key, p in network.named_parameters() if not p.requires_grad}
    backbone = [key for key, _ in network.named_parameters() if key.startswith(("backbone.", "feature_extractor."))]
    assert frozen < set(backbone)
    # The first map of ssd is conv4's, that of ssdlite lies in block 14 of 17: both are still trained.
    first_trained = {"ssd": "feature_extractor.feature_extractor.6.0", "ssdlite": "backbone.to_stride_16.7.conv.0"}
    assert next(key for key in backbone if key not in frozen).startswith(first_trained[name])
