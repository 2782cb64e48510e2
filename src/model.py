"""The two networks: SSD with ResNet-50 (SSD section 2.1) and SSDLite with MobileNetV2.

forward(images (B, 3, 300, 300) float32, ImageNet-normalized)
    -> loc (B, D, 4) box offsets, cls_logits (B, D, C), class 0 is background
"""

import torch
from torch import nn
from torchvision.models import MobileNet_V2_Weights, ResNet50_Weights, mobilenet_v2, resnet50
from torchvision.models.mobilenetv2 import InvertedResidual

from src.boxes import DEFAULT_BOXES

IMAGENET_WEIGHTS = {"ssd": ResNet50_Weights.IMAGENET1K_V2, "ssdlite": MobileNet_V2_Weights.IMAGENET1K_V2}


def build_model(name, num_classes, pretrained_backbone=True):
    """Return the network `name` ("ssd" or "ssdlite") for `num_classes`, background included."""
    return MODELS[name](DEFAULT_BOXES[name], num_classes, pretrained_backbone)


class ResNet50Backbone(nn.Module):
    """ResNet-50 up to conv4, whose first block keeps stride 8: (B, 1024, 38, 38)."""

    # Paper: VGG-16, whose conv4_3 is the first map and L2-normalized. Here: ResNet-50, as in NVIDIA's
    # and uvipen's recipes; batch norm keeps its features in range, so no L2 normalization.
    def __init__(self, pretrained):
        super().__init__()
        # Without pretrained weights features would grow from block to block, and the heads' first steps
        # explode: so each residual block starts as the identity. (Pretrained weights overwrite this.)
        weights = IMAGENET_WEIGHTS["ssd"] if pretrained else None
        resnet = resnet50(weights=weights, zero_init_residual=True)
        first = resnet.layer3[0]  # conv4
        first.conv1.stride = first.conv2.stride = first.downsample[0].stride = (1, 1)
        self.feature_extractor = nn.Sequential(
            resnet.conv1, resnet.bn1, resnet.relu, resnet.maxpool, resnet.layer1, resnet.layer2, resnet.layer3
        )

    def forward(self, images):
        """(B, 3, 300, 300) -> (B, 1024, 38, 38)."""
        return self.feature_extractor(images)


class SSD(nn.Module):
    """SSD300. Parameter names are those of the published SSD-ResNet50 checkpoints."""

    def __init__(self, default_boxes, num_classes, pretrained_backbone):
        super().__init__()
        self.default_boxes, self.num_classes = default_boxes, num_classes
        self.feature_extractor = ResNet50Backbone(pretrained_backbone)
        self.additional_blocks = nn.ModuleList(
            [
                extra_block(1024, 256, 512, stride=2, padding=1),  # 38 -> 19
                extra_block(512, 256, 512, stride=2, padding=1),  # 19 -> 10
                extra_block(512, 128, 256, stride=2, padding=1),  # 10 -> 5
                extra_block(256, 128, 256, stride=1, padding=0),  # 5 -> 3
                extra_block(256, 128, 256, stride=1, padding=0),  # 3 -> 1
            ]
        )
        channels = (1024, 512, 512, 256, 256, 256)
        self.loc, self.conf = nn.ModuleList(), nn.ModuleList()
        for c, boxes in zip(channels, default_boxes.per_cell, strict=True):
            self.loc.append(nn.Conv2d(c, 4 * boxes, 3, padding=1))
            self.conf.append(nn.Conv2d(c, num_classes * boxes, 3, padding=1))
        for part in (self.additional_blocks, self.loc, self.conf):
            part.apply(init_convolution)

    def first_layers(self):
        """The backbone's layers up to stride 8 that `freeze` keeps: conv1 to conv3_x."""
        return self.feature_extractor.feature_extractor[:6]

    def forward(self, images):
        """images (B, 3, 300, 300) -> loc (B, 8732, 4), cls_logits (B, 8732, C)."""
        feature_maps = [self.feature_extractor(images)]
        for block in self.additional_blocks:
            feature_maps.append(block(feature_maps[-1]))
        return predict(self.default_boxes, feature_maps, self.loc, self.conf, self.num_classes)


class MobileNetV2Backbone(nn.Module):
    """MobileNetV2 (arXiv 1801.04381): the two maps that SSDLite starts from (section 6.2)."""

    def __init__(self, pretrained):
        super().__init__()
        weights = IMAGENET_WEIGHTS["ssdlite"] if pretrained else None
        features = mobilenet_v2(weights=weights).features
        block14 = features[14].conv  # 1x1 expansion, 3x3 depthwise with stride 2, 1x1 projection
        self.to_stride_16 = nn.Sequential(*features[:14], block14[0])
        self.to_stride_32 = nn.Sequential(*block14[1:], *features[15:])
        # Subtracted from normalized pixels: not zero only in weights trained with another mean than ImageNet's.
        self.register_buffer("mean", torch.zeros(3, 1, 1))

    def forward(self, images):
        """(B, 3, 300, 300) -> (B, 576, 19, 19), (B, 1280, 10, 10)."""
        expansion = self.to_stride_16(images - self.mean)
        return expansion, self.to_stride_32(expansion)


class SSDLite(nn.Module):
    """SSDLite: extra layers are MobileNetV2's blocks, here narrow inside; heads are depthwise separable."""

    def __init__(self, default_boxes, num_classes, pretrained_backbone):
        super().__init__()
        self.default_boxes, self.num_classes = default_boxes, num_classes
        self.backbone = MobileNetV2Backbone(pretrained_backbone)
        self.additional_blocks = nn.ModuleList(
            [
                InvertedResidual(1280, 512, stride=2, expand_ratio=0.2),  # 10 -> 5
                InvertedResidual(512, 256, stride=2, expand_ratio=0.25),  # 5 -> 3
                InvertedResidual(256, 256, stride=2, expand_ratio=0.5),  # 3 -> 2
                InvertedResidual(256, 64, stride=2, expand_ratio=0.25),  # 2 -> 1
            ]
        )
        channels = (576, 1280, 512, 256, 256, 64)
        layout = zip(channels, default_boxes.per_cell, default_boxes.feature_maps, strict=True)
        self.loc, self.conf = nn.ModuleList(), nn.ModuleList()
        for c, boxes, cells in layout:
            self.loc.append(lite_head(c, 4 * boxes, cells))
            self.conf.append(lite_head(c, num_classes * boxes, cells))
        for part in (self.additional_blocks, self.loc, self.conf):
            part.apply(init_convolution)
        for module in self.modules():
            if isinstance(module, nn.ReLU6):
                module.inplace = False  # in place, autograd would copy its input

    def first_layers(self):
        """The backbone's layers up to stride 8 that `freeze` keeps: the first convolution and six blocks."""
        return self.backbone.to_stride_16[:7]

    def forward(self, images):
        """images (B, 3, 300, 300) -> loc (B, 3000, 4), cls_logits (B, 3000, C)."""
        feature_maps = list(self.backbone(images))
        for block in self.additional_blocks:
            feature_maps.append(block(feature_maps[-1]))
        return predict(self.default_boxes, feature_maps, self.loc, self.conf, self.num_classes)


def extra_block(c_in, c_mid, c_out, stride, padding):
    """1x1 then 3x3 convolution, each with batch norm (Paper: without) and ReLU."""
    return nn.Sequential(
        nn.Conv2d(c_in, c_mid, 1, bias=False),
        nn.BatchNorm2d(c_mid),
        nn.ReLU(inplace=True),
        nn.Conv2d(c_mid, c_out, 3, stride=stride, padding=padding, bias=False),
        nn.BatchNorm2d(c_out),
        nn.ReLU(inplace=True),
    )


def freeze(network):
    """Let the backbone's first layers keep their weights; in training their batch norms keep their statistics, too."""
    network.first_layers().requires_grad_(False)


def lite_head(c_in, c_out, cells):
    """3x3 depthwise + BN + ReLU6 + 1x1; on the last map, which is one cell, a plain 1x1."""
    if cells == 1:
        return nn.Conv2d(c_in, c_out, 1)
    return nn.Sequential(
        nn.Conv2d(c_in, c_in, 3, padding=1, groups=c_in, bias=False),
        nn.BatchNorm2d(c_in),
        nn.ReLU6(),
        nn.Conv2d(c_in, c_out, 1),
    )


def init_convolution(module):
    """Xavier for the new convolutions, as the paper does (section 3)."""
    if isinstance(module, nn.Conv2d):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def predict(default_boxes, feature_maps, loc_heads, conf_heads, num_classes):
    """Run a pair of heads on each map (B, c, h, w); return loc (B, D, 4), cls_logits (B, D, C).

    A head's channel is `coordinate * per_cell + shape` (or `class * per_cell + shape`), so that
    flattening gives the order of `make_default_boxes`: shape, row, column.
    """
    layout = zip(default_boxes.feature_maps, default_boxes.per_cell, strict=True)
    loc, cls_logits = [], []
    for x, loc_head, conf_head, (cells, per_cell) in zip(feature_maps, loc_heads, conf_heads, layout, strict=True):
        assert x.shape[2:] == (cells, cells), f"a map is {tuple(x.shape[2:])}, not {cells} cells wide and high"
        boxes = per_cell * cells * cells
        loc.append(loc_head(x).reshape(len(x), 4, boxes))
        cls_logits.append(conf_head(x).reshape(len(x), num_classes, boxes))
    return torch.cat(loc, dim=2).transpose(1, 2), torch.cat(cls_logits, dim=2).transpose(1, 2)


MODELS = {"ssd": SSD, "ssdlite": SSDLite}
