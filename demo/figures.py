"""Draw how SSD works, from the code itself.

    python -m demo.figures --data-path demo/shapes --pretrained-model demo/ssdlite_shapes.pth
    python -m demo.figures --data-path my_data --model ssd --output figures

Look at your data before you train on it: without a checkpoint those figures are drawn that need none
(the hard negatives are then those of an untrained network). Needs matplotlib (requirements-dev.txt).
"""

import copy
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from src import usage
from src.annotations import load_ground_truth
from src.boxes import DEFAULT_BOXES, NMS_THRESHOLD, Encoder, box_cxcywh_to_xyxy, make_default_boxes, pairwise_iou
from src.dataset import CocoDataset
from src.detector import Detector
from src.engine import evaluate, run_coco_eval
from src.loss import MultiBoxLoss
from src.model import build_model
from src.transform import augment, normalize, resize, sample_patch
from src.usage import UserError
from src.visualize import class_color, place_labels, takes_black_text

try:
    from matplotlib import pyplot as plt
    from matplotlib.colors import to_rgb
    from matplotlib.lines import Line2D
    from matplotlib.patches import FancyBboxPatch, Polygon, Rectangle
    from matplotlib.patheffects import withStroke
    from matplotlib.transforms import Bbox
except ModuleNotFoundError:
    sys.exit(usage.complain("matplotlib is missing: pip install -r requirements-dev.txt"))

# A page is 830 pixels wide, and twice as many on a high-density screen; type of 13 points is still
# legible where a phone shrinks the page to 400 pixels.
WIDTH, PIXELS_PER_INCH = 8.3, 200
STYLE = {"font.size": 12, "axes.titlesize": 13, "figure.titlesize": 14, "legend.frameon": False, "axes.linewidth": 0.8}
COLORS = plt.get_cmap("tab10").colors
INK, BLUE, ORANGE, RED = "#212529", "#1971c2", "#f76707", "#c92a2a"
DASHES = (0, (4, 3))
SCORE = 0.4  # detections below are not drawn
FOUND_IOU = 0.5  # above it an object counts as found

BACKBONES = {"ssd": "ResNet-50\nto conv4", "ssdlite": "MobileNetV2"}
HEADS = {"ssd": "3 x 3 convolutions", "ssdlite": "depthwise 3 x 3, then 1 x 1 convolutions"}


def parse_args():
    parser = usage.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--data-path", default="demo/shapes", help="folder in COCO layout")
    add("--train-set", default="train2017", help="set that default boxes, matching and augmentation are drawn on")
    add("--val-set", default="val2017", help="set that a detector's figures are drawn on")
    add("--model", choices=sorted(DEFAULT_BOXES), help="ssdlite, unless a checkpoint says it")
    add("--pretrained-model", help="checkpoint trained on these classes; adds the figures of a detector")
    add("--output", default="demo/figures", help="folder")
    add("--seed", type=usage.number(int, 0), default=0, help="which images are shown")
    return parser.parse_args()


# Parts of figures


def panels(rows, columns, height):
    """A figure as wide as a README, and its axes, (rows * columns,), without ticks."""
    figure, axes = plt.subplots(rows, columns, figsize=(WIDTH, height), layout="constrained", squeeze=False)
    for ax in axes.flat:
        ax.set_xticks([])
        ax.set_yticks([])
    return figure, axes.ravel()


def show(ax, image, title="", fade=0.0, but=None):
    """An image, `fade` towards white `but` for a box, in relative coordinates: boxes in [0, 1] lie on it."""
    faded = np.uint8(image + (255.0 - image) * fade)
    if but is not None:
        x1, y1, x2, y2 = np.round(but * np.tile(image.shape[1::-1], 2)).astype(int)
        faded[y1:y2, x1:x2] = image[y1:y2, x1:x2]
    image = faded
    ax.imshow(image, extent=(0, 1, 1, 0), aspect=image.shape[0] / image.shape[1], interpolation="bilinear")
    ax.set_title(title)


def outline(ax, boxes, color, width=1.5, style="-", casing=0.0, alpha=1.0):
    """Draw boxes (N, 4) xyxy in [0, 1]; `casing`: a white rim, so that a line shows on its own color."""
    rim = [withStroke(linewidth=width + casing, foreground="white")] if casing else None
    for x1, y1, x2, y2 in np.asarray(boxes).reshape(-1, 4).tolist():
        box = Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, ec=color, lw=width, ls=style, alpha=alpha)
        ax.add_patch(box).set_path_effects(rim)


def mark_objects(ax, boxes):
    """Outline what is annotated: black dashes on white, visible on every color."""
    outline(ax, boxes, "white", 2.4)
    outline(ax, boxes, INK, 1.2, DASHES)


def heat(ax, boxes, losses, size=300):
    """The losses (N,) of boxes (N, 4), each spread over the area of its box."""
    pixels = np.zeros((size, size))
    corners = (boxes.clamp(0, 1) * size).round().int().tolist()
    for (x1, y1, x2, y2), loss in zip(corners, losses.tolist(), strict=True):
        pixels[y1:y2, x1:x2] += loss / max(1, (y2 - y1) * (x2 - x1))
    ax.imshow(pixels, cmap="inferno", extent=(0, 1, 1, 0))


def tag(ax, boxes, texts, colors, size=10, panel=2.6):
    """Write `texts` on plates above their boxes, where `draw_detections` would; `panel`: its width in inches."""
    pixels = panel * 72 * np.array([1, ax.get_aspect()])  # of a point each
    plates = place_labels(texts, np.asarray(boxes) * np.tile(pixels, 2), size, pixels.astype(int).tolist())
    for text, plate, color in zip(texts, plates, colors, strict=True):
        black = takes_black_text(255 * np.array(to_rgb(color)))
        style = {"color": "black" if black else "white", "fontsize": size, "va": "top"}
        style["bbox"] = {"fc": color, "ec": "none", "pad": 1}
        ax.text(plate[0] / pixels[0], plate[1] / pixels[1], text, **style)


def legend(figure, entries, title=None):
    """A legend under the panels of {text: line style}."""
    lines = [Line2D([], [], **style) for style in entries.values()]
    style = {"ncols": len(entries), "title": title, "handlelength": 1.4, "columnspacing": 1.2, "handletextpad": 0.5}
    figure.legend(lines, list(entries), loc="outside lower center", **style)


def pick(data, rng, count, fewest, most):
    """Indices of up to `count` images at random, with so many objects or, if there are none such, nearly."""
    objects = np.diff(data.starts)
    off = np.maximum(fewest - objects, objects - most).clip(0)
    off[objects == 0] += off.max() * (fewest > 0)  # an empty image shows nothing: the last resort
    order = rng.permutation(len(data))
    return order[off[order] == off.min()][:count].tolist()


def class_colors(labels):
    """The colors that boxes of these labels are drawn in, as matplotlib wants them."""
    return [tuple(channel / 255 for channel in class_color(int(label))) for label in labels]


def detect(detector, image, nms_threshold=NMS_THRESHOLD):
    """What is found in an image: boxes (K, 4) in [0, 1], labels and scores (K,)."""
    found = detector([image], SCORE, nms_threshold)[0]
    return found["boxes"] / torch.tensor(image.shape[1::-1]).repeat(2), found["labels"], found["scores"]


def compare(boxes, labels, found_boxes, found_labels):
    """Which objects are found (G,), which detections are right (K,): same class, IoU above 0.5, once each."""
    iou = pairwise_iou(torch.from_numpy(boxes), found_boxes).numpy()
    iou[labels[:, None] != found_labels.numpy()] = 0
    found = np.zeros(len(boxes), bool)
    right = np.zeros(len(found_boxes), bool)
    for k in range(len(found_boxes) if len(boxes) else 0):  # scores descend
        g = iou[:, k].argmax()
        if iou[g, k] > FOUND_IOU:
            found[g] = right[k] = True
            iou[g] = 0
    return found, right


def pick_right(data, rng, detector, fewest, most):
    """Index of the image, of 100, in which the detector makes no mistake and is surest."""

    def order(index):
        boxes, labels, scores = detect(detector, data.read(index))
        objects, right = compare(*data.objects(index), boxes, labels)
        return (~objects).sum() + (~right).sum(), -scores.min() if len(scores) else 0

    return min(pick(data, rng, 100, fewest, most), key=order)


# How SSD works


def network(name, num_classes, image):
    """From an image to detections: layers, feature maps, heads and numbers of boxes."""
    constants = DEFAULT_BOXES[name]
    untrained = build_model(name, num_classes, pretrained_backbone=False)
    channels = [next(m for m in head.modules() if isinstance(m, nn.Conv2d)).in_channels for head in untrained.loc]
    counts = [cells**2 * boxes for cells, boxes in zip(constants.feature_maps, constants.per_cell, strict=True)]
    figure = plt.figure(figsize=(WIDTH, 4.5))
    ax = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(0, 4.5))  # in inches
    ax.axis("off")

    def box(x, y, width, height, text, color):
        ax.add_patch(FancyBboxPatch((x, y), width, height, "round,pad=0,rounding_size=0.08", fc=color, ec=INK, lw=1))
        ax.text(x + width / 2, y + height / 2, text, ha="center", va="center")

    def arrow(x1, y1, x2, y2):
        ax.annotate("", (x2, y2), (x1, y1), arrowprops={"arrowstyle": "-|>", "color": INK, "lw": 1.2, "shrinkA": 0})

    ax.imshow(resize(image, constants.input_size), extent=(0.1, 1.1, 3.15, 4.15))
    ax.set(xlim=(0, WIDTH), ylim=(0, 4.5), aspect="auto")
    ax.text(0.6, 4.32, f"{constants.input_size} x {constants.input_size}", ha="center", va="center")
    arrow(1.12, 3.65, 1.33, 3.65)
    ax.add_patch(Polygon([(1.35, 3.1), (1.35, 4.2), (2.6, 4.0), (2.6, 3.3)], fc="#d0ebff", ec=INK, lw=1))
    ax.text(1.97, 3.65, BACKBONES.get(name, "backbone"), ha="center", va="center")
    right_of_last = 2.6
    rows = {2.85: "cells", 2.6: "channels", 1.35: "default boxes per cell", 1.05: "default boxes"}
    for y, text in rows.items():
        ax.text(2.75, y, text, ha="right", va="center", color="#495057")
    columns = np.linspace(3.35, WIDTH - 0.4, len(constants.feature_maps))
    for k, (x, cells) in enumerate(zip(columns, constants.feature_maps, strict=True)):
        side = 0.74 * (cells / constants.feature_maps[0]) ** 0.5
        left, bottom = x - side / 2, 3.65 - side / 2
        for shift in (0.08, 0.04, 0):  # channels, one behind the other
            fill = "#ffe8cc" if k >= len(constants.feature_maps) - len(untrained.additional_blocks) else "#d0ebff"
            ax.add_patch(Rectangle((left + shift, bottom + shift), side, side, fc=fill, ec=INK, lw=0.8))
        inner = np.linspace(0, side, cells + 1)[1:-1]
        ax.hlines(bottom + inner, left, left + side, color=INK, lw=0.25)
        ax.vlines(left + inner, bottom, bottom + side, color=INK, lw=0.25)
        arrow(right_of_last + 0.02, 3.65, left - 0.02, 3.65)
        right_of_last = left + side + 0.08
        texts = f"{cells} x {cells}", str(channels[k]), str(constants.per_cell[k]), f"{counts[k]:,}"
        for y, text in zip(rows, texts, strict=True):
            ax.text(x, y, text, ha="center", va="center")
        arrow(x, 2.45, x, 2.22)
        arrow(x, 1.68, x, 1.5)
        if k:
            ax.text((x + columns[k - 1]) / 2, 1.05, "+", ha="center", va="center")
    outputs = f"per default box 4 offsets and {num_classes} class scores (one: background)"
    box(2.9, 1.68, WIDTH - 3.0, 0.52, f"heads: {HEADS.get(name, 'convolutions')}\n{outputs}", "#d3f9d8")
    box(0.1, 0.2, 3.0, 0.45, f"= {sum(counts):,} boxes with scores", "#f1f3f5")
    arrow(3.12, 0.42, 3.43, 0.42)
    box(3.45, 0.2, 2.1, 0.45, "NMS for each class", "#fff3bf")
    arrow(5.57, 0.42, 5.88, 0.42)
    box(5.9, 0.2, 2.3, 0.45, "at most 200 detections", "#f1f3f5")
    return figure


def default_boxes(data, rng, name):
    """The default boxes of one cell on each map, on an object of their size."""
    constants = DEFAULT_BOXES[name]
    corners = box_cxcywh_to_xyxy(make_default_boxes(name))
    ratios = {"1": 0, "1, larger": 1}  # of boxes in make_default_boxes' order
    for n, ratio in enumerate(max(constants.ratios, key=len)):
        ratios |= {f"{ratio}": 2 + 2 * n, f"1/{ratio}": 3 + 2 * n}
    rows = -(-len(constants.feature_maps) // 3)
    figure, axes = panels(rows, 3, 3.1 * rows + 0.7)
    first = 0
    columns = constants.feature_maps, constants.strides, constants.per_cell
    for ax, cells, stride, per_cell in zip(axes, *columns, strict=False):
        of_map = corners[first : first + cells**2 * per_cell]
        first += len(of_map)
        middle = cells // 2
        boxes = of_map.reshape(per_cell, cells, cells, 4)[:, middle, middle]  # shape, row, column
        # The object, of all in the data set, that one of these boxes fits best.
        iou = pairwise_iou(torch.from_numpy(data.boxes), boxes).numpy()  # (G, per_cell)
        g, best = np.unravel_index(iou.argmax(), iou.shape)
        index = np.searchsorted(data.starts, g, side="right") - 1
        image = resize(data.read(index), constants.input_size)
        show(ax, image, f"{cells} x {cells} cells\n{len(of_map):,} boxes", fade=0.65, but=data.boxes[g])
        borders = np.arange(0, constants.input_size, stride) / constants.input_size  # the last cell may be cut short
        ax.hlines([*borders, 1], 0, 1, color=INK, lw=0.4, alpha=0.6)
        ax.vlines([*borders, 1], 0, 1, color=INK, lw=0.4, alpha=0.6)
        side = stride / constants.input_size
        ax.add_patch(Rectangle((middle * side, middle * side), side, side, fc=INK, ec="black", alpha=0.3))
        for n, box in enumerate(boxes):
            outline(ax, box, COLORS[n], 3 if n == best else 1.5, casing=1)
        mark_objects(ax, data.boxes[g])
        low, high = min(0, float(boxes.min())) - 0.01, max(1, float(boxes.max())) + 0.01
        ax.set(xlim=(low, high), ylim=(high, low))
    entries = {text: {"color": COLORS[n], "lw": 2.5} for text, n in ratios.items()}
    entries["cell"] = {"color": "gray", "marker": "s", "ms": 10, "ls": "none"}
    entries["object"] = {"color": INK, "lw": 1.5, "ls": DASHES}
    legend(figure, entries, "aspect ratio")
    return figure


def matching(data, rng, name):
    """The default boxes that each object of an image is matched to, and one that just is not."""
    encoder = Encoder(make_default_boxes(name))
    size = DEFAULT_BOXES[name].input_size

    def margin(index):  # of blank around the objects: where it is wide, few boxes reach out of the image
        boxes, _ = data.objects(index)
        return min(boxes[:, :2].min(), 1 - boxes[:, 2:].max())

    index = max(pick(data, rng, 100, fewest=6, most=6), key=margin)
    image = resize(data.read(index), size)
    boxes, labels = data.objects(index)
    boxes = torch.from_numpy(boxes)
    # Each object is a class of its own here, so that the targets say whose a default box is.
    _, owners = encoder.encode(boxes, torch.arange(1, len(boxes) + 1))
    iou = pairwise_iou(boxes, encoder.corners)
    figure, axes = panels(2, 3, 6.6)
    for g, ax in enumerate(axes):
        ax.set_visible(g < len(boxes))
        if g >= len(boxes):
            continue
        matched = (owners == g + 1).nonzero().squeeze(1)
        best = int(iou[g].argmax())
        nearly = int(iou[g].where((owners == 0) & (iou[g] < 0.495), 0).argmax())  # not one that rounds to 0.50
        show(ax, image, f"{data.classes[labels[g]]}: {len(matched)} matched\nbest IoU {iou[g, best]:.2f}", fade=0.5)
        outline(ax, encoder.corners[matched], BLUE, 1)
        outline(ax, encoder.corners[nearly], RED, 2, "--", casing=1)
        if owners[best] == g + 1:  # unless a later object has taken it
            outline(ax, encoder.corners[best], ORANGE, 2.6, casing=1)
        mark_objects(ax, boxes[g])
        seen = torch.cat([encoder.corners[matched], encoder.corners[[nearly]], boxes[[g]]])
        low, high = seen[:, :2].amin(0), seen[:, 2:].amax(0)
        x, y = ((low + high) / 2).tolist()
        reach = float((high - low).max()) / 2 + 0.02
        ax.set(xlim=(x - reach, x + reach), ylim=(y + reach, y - reach))
        x, _, _, y = encoder.corners[nearly].tolist()
        plate = {"fc": RED, "ec": "none", "pad": 2}
        ax.text(x, y, f"{iou[g, nearly]:.2f}", color="white", va="bottom", bbox=plate)
    legend(
        figure,
        {
            "object": {"color": INK, "lw": 1.5, "ls": DASHES},
            "best IoU": {"color": ORANGE, "lw": 3},
            "IoU above 0.5": {"color": BLUE, "lw": 1.5},
            "just below 0.5: background": {"color": RED, "lw": 2, "ls": "--"},
        },
    )
    return figure


def augmentation(data, rng, name):
    """Four patches of one image, and what the network is shown of them."""
    size = DEFAULT_BOXES[name].input_size
    index = pick(data, rng, 1, fewest=4, most=7)[0]
    image = data.read(index)
    boxes, labels = data.objects(index)
    figure = plt.figure(figsize=(WIDTH, 4.7), layout="constrained")
    axes = figure.subplot_mosaic("AABC;AADE")
    for ax in axes.values():
        ax.set(xticks=[], yticks=[])
    original, *results = axes.values()
    show(original, image, f"{len(boxes)} objects, four patches")
    outline(original, boxes, "white", 1)
    patches = torch.zeros(0, 4)
    for _ in range(1000):  # draws, until there are four that differ
        # The patch is what `augment` draws first: a copy of the generator draws the same.
        ahead = copy.deepcopy(rng)
        patch = sample_patch(boxes, ahead) if len(boxes) else None
        mirrored = ahead.random() < 0.5
        drawn, kept, _ = augment(image, boxes, labels, rng, size)
        patch = torch.tensor([[0, 0, 1, 1.0]] if patch is None else patch[None]).float()
        whole = (patch[0, 2:] - patch[0, :2]).prod() > 0.6
        if whole or (pairwise_iou(patch, patches) > 0.4).any() or mirrored != len(patches) % 2:
            continue
        color = COLORS[len(patches)]
        ax = results[len(patches)]
        patches = torch.cat([patches, patch])
        outline(original, patch, color, 3, casing=1.5)
        show(ax, drawn, f"{len(kept)} of {len(boxes)}" + (", mirrored" if mirrored else ""))
        outline(ax, kept, "white", 1)
        ax.spines[:].set(color=color, linewidth=3)
        if len(patches) == len(results):
            break
    return figure


def hard_negatives(data, rng, name, net):
    """The background boxes that count in the loss: three for each matched one."""
    encoder = Encoder(make_default_boxes(name))
    index = pick(data, rng, 1, fewest=1, most=2)[0]
    image = resize(data.read(index), DEFAULT_BOXES[name].input_size)
    boxes, labels = map(torch.from_numpy, data.objects(index))
    loc_targets, cls_targets = encoder.encode(boxes, labels)
    with torch.no_grad():
        loc, cls_logits = net.eval()(normalize(torch.from_numpy(image)[None]))
    # The loss itself says which boxes it counts: those that its gradient reaches.
    cls_logits.requires_grad_()
    _, cls_loss = MultiBoxLoss()(loc, cls_logits, loc_targets[None], cls_targets[None])
    cls_loss.backward()
    counted = cls_logits.grad[0].abs().sum(dim=1) > 0
    matched = cls_targets > 0
    chosen = counted & ~matched
    loss = F.cross_entropy(cls_logits[0].detach(), cls_targets, reduction="none")
    figure = plt.figure(figsize=(WIDTH, 3.8), layout="constrained")
    axes = figure.subplot_mosaic("ABC;DDD", height_ratios=(5, 1))
    left, middle, right, bar = axes.values()
    counts = [int(part.sum()) for part in (matched, chosen, ~counted)]
    show(left, image, f"{counts[0]} matched boxes", fade=0.45)
    outline(left, encoder.corners[matched], BLUE, 1.2)
    show(middle, image, "background loss")
    heat(middle, encoder.corners[~matched], loss[~matched])
    show(right, image, f"{counts[1]} hardest negatives", fade=0.45)
    outline(right, encoder.corners[chosen], RED, 1.2)
    for ax in (left, middle, right):
        mark_objects(ax, boxes)
        ax.set(xticks=[], yticks=[], xlim=(0, 1), ylim=(1, 0))
    start = 0
    for count, color in zip(counts, (BLUE, RED, "#dee2e6"), strict=True):
        bar.barh(0, count, left=start, color=color)
        start += count
    bar.axis("off")
    bar.set(xlim=(0, start), ylim=(-0.5, 1.4))
    bar.text(0, 0.55, f"{counts[0]} matched + {counts[1]} hardest negatives count", va="bottom")
    bar.text(start, 0.55, f"{counts[2]:,} do not", va="bottom", ha="right")
    return figure


# What a trained detector does


def hero(data, rng, detector):
    """An image, the default boxes of one map, the boxes that the network makes of them, detections."""
    index = pick_right(data, rng, detector, fewest=5, most=6)
    image = data.read(index)
    constants = DEFAULT_BOXES[detector.name]
    corners = box_cxcywh_to_xyxy(make_default_boxes(detector.name))
    counts = [cells**2 * per_cell for cells, per_cell in zip(constants.feature_maps, constants.per_cell, strict=True)]
    figure, axes = panels(1, 4, 2.45)
    raw, raw_labels, _ = detect(detector, image, nms_threshold=1.0)
    boxes, labels, _ = detect(detector, image)
    show(axes[0], image, "image")
    show(axes[1], image, "default boxes", fade=0.45)
    k = 2  # the third map: few enough cells
    of_map = corners[sum(counts[:k]) : sum(counts[: k + 1])]
    outline(axes[1], of_map, BLUE, 0.5, alpha=0.4)
    cell = slice(constants.feature_maps[k] ** 2 // 2, None, constants.feature_maps[k] ** 2)  # the one in the middle
    outline(axes[1], of_map[cell], ORANGE, 1.8, casing=1)
    show(axes[2], image, "raw boxes", fade=0.3)
    for box, color in zip(raw, class_colors(raw_labels), strict=True):
        outline(axes[2], box, color, 1)
    show(axes[3], image, "after NMS")
    for box, color in zip(boxes, class_colors(labels), strict=True):
        outline(axes[3], box, color, 2, casing=1)
    tag(axes[3], boxes, [detector.classes[label] for label in labels], class_colors(labels), 9, panel=2)
    for ax in axes:
        ax.set(xlim=(0, 1), ylim=(1, 0))
    return figure


def before_and_after_nms(data, rng, detector):
    """Boxes of one image before and after non-maximum suppression, and why one of them goes."""
    index = pick_right(data, rng, detector, fewest=3, most=4)
    image = data.read(index)
    figure, axes = panels(1, 2, 4.3)
    raw, raw_labels, raw_scores = detect(detector, image, nms_threshold=1.0)
    boxes, labels, scores = detect(detector, image)
    show(axes[0], image, f"before: {len(raw)} boxes", fade=0.35)
    show(axes[1], image, f"after: {len(boxes)} boxes", fade=0.35)
    for box, color in zip(raw, class_colors(raw_labels), strict=True):
        outline(axes[0], box, color, 1.2)
    for box, color in zip(boxes, class_colors(labels), strict=True):
        outline(axes[1], box, color, 3, casing=1.5)
    texts = [f"{detector.classes[label]} {score:.2f}" for label, score in zip(labels, scores, strict=True)]
    tag(axes[1], boxes, texts, class_colors(labels), 12, panel=4)
    if len(raw) > len(boxes):  # of those that were removed, the one that overlaps its better one least
        iou = pairwise_iou(raw, boxes).where(raw_labels[:, None] == labels, 0)
        iou, better = iou.where(iou > NMS_THRESHOLD, 2).min(dim=1)
        worst = int(iou.argmin())
        kept = int(better[worst])
        outline(axes[0], boxes[kept], class_colors(labels)[kept], 3, casing=1.5)
        outline(axes[0], raw[worst], INK, 3, "--", casing=2)
        text = f"{raw_scores[worst]:.2f}, removed: IoU {iou[worst]:.2f} with {scores[kept]:.2f}"
        tag(axes[0], raw[[worst]], [text], [INK], 11, panel=4)
    return figure


def precision_recall(data, detector):
    """Precision over recall at IoU 0.5: AP of one class, and all classes; pycocotools' own curves."""
    loader = torch.utils.data.DataLoader(data, batch_size=8)
    ground_truth = load_ground_truth(data.annotation_file)
    _, detections = evaluate(detector, loader, ground_truth)
    coco_eval = run_coco_eval(ground_truth, detections, detector.category_ids)
    recall = coco_eval.params.recThrs
    (t,) = np.flatnonzero(np.isclose(coco_eval.params.iouThrs, FOUND_IOU))
    curves = coco_eval.eval["precision"][t, :, :, 0, -1]  # recall, class; all sizes, 100 boxes
    present = np.flatnonzero((curves > -1).all(axis=0))
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 4.2), layout="constrained", sharey=True)
    for ax in axes:
        ax.set(xlabel="recall", xlim=(0, 1), ylim=(0, 1.02))
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("precision")
    axes[1].set_title("all classes")
    if len(present):
        median = present[curves[:, present].mean(axis=0).argsort()[len(present) // 2]]
        axes[0].set_title(f"one class: {data.classes[median + 1]}")
        axes[0].fill_between(recall, curves[:, median], color=BLUE, alpha=0.25, lw=0)
        axes[0].plot(recall, curves[:, median], color=BLUE, lw=2.5)
        axes[0].text(0.45, 0.45, f"AP = this area\n= {curves[:, median].mean():.2f}", ha="center", fontsize=16)
        for k in present if len(present) <= 10 else []:  # else their mean alone is legible
            label = f"{data.classes[k + 1]} {curves[:, k].mean():.2f}"
            axes[1].plot(recall, curves[:, k], color=class_colors([k + 1])[0], lw=2, label=label)
        mean = curves[:, present].mean(axis=1)
        axes[1].plot(recall, mean, color=INK, lw=2.5, ls="--", label=f"mean {mean.mean():.2f}")
        axes[1].legend(title="AP at IoU 0.5", loc="lower left")
    return figure


def predictions(data, rng, detector):
    """Six validation images as they come: detections, what is annotated, and how many are missed."""
    ratio = data.sizes[:, 0] / data.sizes[:, 1]
    usual = np.abs(np.log(ratio / np.median(ratio))) < 0.15  # little is lost when they are drawn in one shape
    chosen = [i for i in pick(data, rng, len(data), fewest=2, most=5) if usual[i]][:6]
    figure, axes = panels(2, 3, 6.4)
    totals = np.zeros(3, int)  # objects, found, false boxes
    for ax, index in zip(axes, chosen, strict=False):
        image = data.read(index)
        objects = data.objects(index)
        boxes, labels, scores = detect(detector, image)
        found, right = compare(*objects, boxes, labels)
        false = (~right).sum()
        totals += len(found), found.sum(), false
        show(ax, image, f"{found.sum()} of {len(found)} found" + (f", {false} false" if false else ""))
        ax.set_aspect(1 / np.median(ratio))
        mark_objects(ax, objects[0])
        for box, color in zip(boxes, class_colors(labels), strict=True):
            outline(ax, box, color, 2, casing=1)
        tag(ax, boxes, [f"{score:.2f}" for score in scores], class_colors(labels))
    for ax in axes[len(chosen) :]:
        ax.set_visible(False)
    if len(data.classes) <= 10:
        names = dict(zip(data.classes[1:], class_colors(range(1, len(data.classes))), strict=True))
        entries = {name: {"color": color, "lw": 3} for name, color in names.items()}
        legend(figure, entries | {"annotated": {"color": INK, "lw": 1.5, "ls": DASHES}})
    figure.suptitle(f"{totals[1]} of {totals[0]} objects found, {totals[2]} false boxes")
    return figure


def main():
    args = parse_args()
    plt.switch_backend("Agg")
    plt.rcParams.update(STYLE)
    detector = args.pretrained_model and Detector.load(args.pretrained_model, "cpu")
    name = detector.name if detector else args.model or "ssdlite"
    if args.model not in (None, name):
        raise UserError(f"--model {args.model}: {args.pretrained_model} is {name}; leave it out")
    train_set = CocoDataset(args.data_path, args.train_set)
    if detector and detector.classes != train_set.classes:
        raise UserError(
            f"--pretrained-model {args.pretrained_model}: finds other classes than those of"
            f" {train_set.annotation_file}: leave it out, or train one on them"
        )
    if not len(train_set.boxes):
        raise UserError(f"{train_set.annotation_file}: has no boxes to draw")
    folder = Path(args.output)
    usage.prepare_output("--output", folder / "network_ssd.png")

    def draw(function, *given, file=None):
        figure = function(*given)
        path = folder / (file or f"{function.__name__}.jpg")
        # At this density JPEG smears no type, as long as colors keep their resolution.
        options = {"optimize": True}
        if path.suffix == ".jpg":
            options |= {"quality": 75, "subsampling": 0, "progressive": True}
        figure.draw_without_rendering()  # lays it out, so that blank above and below can be cut off
        tight = figure.get_tightbbox()
        extent = Bbox.from_extents(0, tight.y0 - 0.05, WIDTH, tight.y1 + 0.05)
        figure.savefig(path, dpi=PIXELS_PER_INCH, bbox_inches=extent, pil_kwargs=options)
        plt.close(figure)
        print(path)

    def rng():  # Each figure draws its own random numbers: one more of them changes no other.
        return np.random.default_rng(args.seed)

    torch.manual_seed(args.seed)
    net = detector.network if detector else build_model(name, len(train_set.classes), False)
    image = train_set.read(pick(train_set, rng(), 1, fewest=3, most=6)[0])
    for each in DEFAULT_BOXES:
        draw(network, each, len(train_set.classes), image, file=f"network_{each}.png")
    for function in (default_boxes, matching, augmentation):
        draw(function, train_set, rng(), name)
    draw(hard_negatives, train_set, rng(), name, net)
    if detector:
        val_set = CocoDataset(args.data_path, args.val_set)
        for function in (hero, before_and_after_nms, predictions):
            draw(function, val_set, rng(), detector)
        draw(precision_recall, val_set, detector, file="precision_recall.png")


if __name__ == "__main__":
    usage.run(main)
