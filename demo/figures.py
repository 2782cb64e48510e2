"""Draw how SSD works, from the code itself: seven figures.

    python -m demo.figures --data-path demo/shapes --pretrained-model demo/ssdlite_shapes.pth
    python -m demo.figures --data-path my_data --model ssd --output figures

Look at your data before you train on it: without a checkpoint the first four are drawn (the hard
negatives are then those of an untrained network). Needs matplotlib (requirements-dev.txt).
"""

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from src import usage
from src.annotations import ground_truth
from src.boxes import DEFAULT_BOXES, Encoder, make_default_boxes, pairwise_iou, to_corners
from src.dataset import CocoDataset
from src.detector import Detector
from src.engine import coco_results, evaluate, run_coco_eval
from src.loss import MultiBoxLoss
from src.model import build_model
from src.transform import augment, normalize, resize
from src.usage import UserError
from src.visualize import class_colour, draw_detections

try:
    from matplotlib import pyplot as plt
    from matplotlib.patches import Rectangle
except ModuleNotFoundError:
    sys.exit(usage.complain("matplotlib is missing: pip install -r requirements-dev.txt"))

plt.switch_backend("Agg")

COLOURS = plt.get_cmap("tab10").colors


def parse_args():
    """The command line."""
    parser = usage.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data-path", default="demo/shapes", help="folder in COCO layout")
    add("--train-set", default="train2017", help="of the first four figures")
    add("--val-set", default="val2017", help="of the last three")
    add("--model", choices=sorted(DEFAULT_BOXES), help="ssdlite, unless a checkpoint says it")
    add("--pretrained-model", help="checkpoint trained on these classes; adds the last three")
    add("--output", default="demo/figures", help="folder")
    add("--seed", type=usage.number(int, 0), default=0, help="which pictures are shown")
    return parser.parse_args()


# Parts of figures


def panels(rows, columns, height):
    """A figure as wide as a README, and its axes, (rows * columns,), without ticks."""
    figure, axes = plt.subplots(rows, columns, figsize=(8.3, height), layout="constrained", squeeze=False)
    for ax in axes.flat:
        ax.set_xticks([])
        ax.set_yticks([])
    return figure, axes.ravel()


def show(ax, image, title="", pale=0.0):
    """A picture, `pale` towards white, in relative coordinates: boxes in [0, 1] lie on it."""
    image = np.uint8(image + (255.0 - image) * pale)
    ax.imshow(image, extent=(0, 1, 1, 0), aspect=image.shape[0] / image.shape[1])
    ax.set_title(title, fontsize=9)


def outline(ax, boxes, colour, width=1.0, style="-"):
    """Draw boxes (N, 4) xyxy in [0, 1]."""
    for x1, y1, x2, y2 in np.asarray(boxes).reshape(-1, 4).tolist():
        ax.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, ec=colour, lw=width, ls=style))


def pick(data, rng, count, fewest, most):
    """Indices of `count` pictures at random, with so many objects if there are such."""
    objects = np.diff(data.starts)
    off = np.maximum(fewest - objects, objects - most).clip(0)
    order = rng.permutation(len(data))
    return order[np.argsort(off[order], kind="stable")][:count].tolist()


def class_colours(labels):
    """The colours that boxes of these labels are drawn in, as matplotlib wants them."""
    return [tuple(channel / 255 for channel in class_colour(int(label))) for label in labels]


# How SSD works


def default_boxes(data, rng, name):
    """The default boxes of one cell on each of the six maps."""
    constants, corners = DEFAULT_BOXES[name], to_corners(make_default_boxes(name)).numpy()
    image = resize(data.read(pick(data, rng, 1, fewest=3, most=12)[0]), constants.input_size)
    figure, axes = panels(2, 3, 6.0)
    first = 0
    maps = zip(axes, constants.maps, constants.steps, constants.per_cell, strict=True)
    for ax, cells, step, per_cell in maps:
        of_map = corners[first : first + cells**2 * per_cell]
        first += len(of_map)
        of_map = of_map.reshape(per_cell, cells, cells, 4)  # shape, row, column
        total = f"{per_cell * cells**2} boxes"
        show(ax, image, f"{cells} x {cells} cells, {per_cell} boxes each: {total}", pale=0.55)
        borders = np.arange(0, constants.input_size, step) / constants.input_size  # the last cell may be cut short
        ax.hlines([*borders, 1], 0, 1, color="grey", lw=0.5)
        ax.vlines([*borders, 1], 0, 1, color="grey", lw=0.5)
        middle = cells // 2
        for n, box in enumerate(of_map[:, middle, middle]):
            outline(ax, box, COLOURS[n], 1.6)
        ax.plot(*of_map[0, middle, middle].reshape(2, 2).mean(axis=0), "k.", ms=4)
        ax.set(xlim=(-0.3, 1.3), ylim=(1.3, -0.3))
    figure.suptitle(f"{name}: {first} default boxes on six feature maps; those of one cell", fontsize=11)
    return figure


def matching(data, rng, name):
    """The default boxes that each object of a picture is matched to."""
    encoder = Encoder(make_default_boxes(name))
    index = pick(data, rng, 1, fewest=6, most=6)[0]
    image, (boxes, labels) = resize(data.read(index), 300), data.objects(index)
    boxes = torch.from_numpy(boxes)
    # Each object is a class of its own here, so that the targets say whose a default box is.
    _, owners = encoder.encode(boxes, torch.arange(1, len(boxes) + 1))
    iou = pairwise_iou(boxes, encoder.corners)
    figure, axes = panels(2, 3, 6.0)
    for g, ax in enumerate(axes):
        ax.set_visible(g < len(boxes))
        if g >= len(boxes):
            continue
        own, best = (owners == g + 1).nonzero().squeeze(1), int(iou[g].argmax())
        title = f"{data.classes[labels[g]]}: {len(own)} default box" + "es" * (len(own) != 1)
        title += f", best IoU {iou[g, best]:.2f}"
        show(ax, image, title, pale=0.35)
        outline(ax, boxes[g], "black", 4)
        outline(ax, boxes[g], "white", 2)
        outline(ax, encoder.corners[own], COLOURS[0], 0.9)
        if owners[best] == g + 1:  # unless a later object has taken it
            outline(ax, encoder.corners[best], COLOURS[3], 2)
        ax.set(xlim=(-0.08, 1.08), ylim=(1.08, -0.08))
    figure.suptitle(
        "Matching. White: the object. Red: the default box it overlaps most."
        "\nBlue: the others with IoU above 0.5. What no object has is background.",
        fontsize=10,
    )
    return figure


def augmentation(data, rng, name):
    """One picture, and eight times what the augmentation makes of it."""
    index = pick(data, rng, 1, fewest=3, most=7)[0]
    image, (boxes, labels) = data.read(index), data.objects(index)
    figure, axes = panels(3, 3, 8.6)
    show(axes[0], image, f"the picture, {image.shape[1]} x {image.shape[0]}")
    for box, colour in zip(boxes, class_colours(labels), strict=True):
        outline(axes[0], box, colour, 2)
    for ax in axes[1:]:
        drawn, kept, names = augment(image, boxes, labels, rng, 300)
        show(ax, drawn, f"{len(kept)} of {len(boxes)} objects")
        for box, colour in zip(kept, class_colours(names), strict=True):
            outline(ax, box, colour, 2)
    figure.suptitle("Augmentation: patch, mirror, resize to 300 x 300, colours", fontsize=11)
    return figure


def hard_negatives(data, rng, name, network, state):
    """The background boxes that count in the loss: three for each matched one."""
    encoder = Encoder(make_default_boxes(name))
    chosen = pick(data, rng, 4, fewest=1, most=3)
    images = np.stack([resize(data.read(index), 300) for index in chosen])
    objects = [[torch.from_numpy(part) for part in data.objects(index)] for index in chosen]
    targets = [encoder.encode(*one) for one in objects]
    loc_targets, cls_targets = (torch.stack(part) for part in zip(*targets, strict=True))
    with torch.no_grad():
        loc, cls_logits = network.eval()(normalize(torch.from_numpy(images)))
    # The loss itself says which boxes it counts: those that its gradient reaches.
    cls_logits.requires_grad_()
    _, cls_loss = MultiBoxLoss()(loc, cls_logits, loc_targets, cls_targets)
    cls_loss.backward()
    pull = cls_logits.grad.abs().sum(dim=2)
    counted = pull > 0
    figure, axes = panels(2, 2, 8.6)
    for n, ax in enumerate(axes[: len(images)]):
        positive = cls_targets[n] > 0
        negative = counted[n] & ~positive
        title = f"{int(positive.sum())} matched, {int(negative.sum())} hardest negatives"
        show(ax, images[n], title, pale=0.35)
        outline(ax, objects[n][0], "black", 4)
        outline(ax, objects[n][0], "white", 2)
        outline(ax, encoder.corners[positive], COLOURS[2], 0.8)
        outline(ax, encoder.corners[negative], COLOURS[3], 0.3)
        hardest = torch.where(negative, pull[n], 0).topk(min(5, int(negative.sum()))).indices
        outline(ax, encoder.corners[hardest], COLOURS[3], 2)
        ax.set(xlim=(0, 1), ylim=(1, 0))
    figure.suptitle(
        f"Hard negative mining, {state} network. White: objects. Green: matched default boxes."
        "\nRed: background with the highest loss, three for each green one, the five worst thick;"
        f"\nthe others of {positive.numel()} do not count.",
        fontsize=10,
    )
    return figure


# What a trained detector does


def before_and_after_nms(data, rng, detector):
    """Boxes of one picture before and after non-maximum suppression."""
    index = pick(data, rng, 1, fewest=4, most=8)[0]
    image = data.read(index)
    figure, axes = panels(1, 2, 4.7)
    for ax, threshold, title in zip(axes, (1.0, 0.5), ("before", "after"), strict=True):
        found = detector([image], score_threshold=0.3, nms_threshold=threshold)[0]
        show(ax, image, f"{title}: {len(found['boxes'])} boxes with scores above 0.3", pale=0.3)
        scale = np.tile(image.shape[1::-1], 2)
        for box, colour in zip(found["boxes"], class_colours(found["labels"]), strict=True):
            outline(ax, box.numpy() / scale, colour, 1.2)
    figure.suptitle("Non-maximum suppression, class by class, IoU above 0.5", fontsize=11)
    return figure


def precision_recall(data, detector):
    """Precision over recall of each class, at IoU 0.5 and 0.75; pycocotools' own curves."""
    loader = torch.utils.data.DataLoader(data, batch_size=8)
    truth = ground_truth(data.annotation_file)
    _, detections = evaluate(detector, loader, truth)
    coco_eval = run_coco_eval(truth, coco_results(detections))
    recall = coco_eval.params.recThrs
    figure, axes = plt.subplots(1, 2, figsize=(8.3, 4.2), layout="constrained", sharey=True)
    for ax, iou in zip(axes, (0.5, 0.75), strict=True):
        (t,) = np.flatnonzero(np.isclose(coco_eval.params.iouThrs, iou))
        curves = coco_eval.eval["precision"][t, :, :, 0, -1]  # recall, class; all sizes, 100 boxes
        present = np.flatnonzero((curves > -1).all(axis=0))
        for k in present if len(present) <= 10 else []:  # else their mean alone is legible
            label = f"{data.classes[k + 1]} {curves[:, k].mean():.2f}"
            ax.plot(recall, curves[:, k], color=class_colours([k + 1])[0], lw=1.4, label=label)
        if len(present):
            mean = curves[:, present].mean(axis=1)
            ax.plot(recall, mean, color="black", lw=2, ls="--", label=f"mean {mean.mean():.2f}")
        ax.set(xlabel="recall", xlim=(0, 1), ylim=(0, 1.02), title=f"IoU {iou}")
        ax.legend(fontsize=8, title="AP")
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("precision")
    figure.suptitle(f"Precision and recall on {len(data)} validation pictures", fontsize=11)
    return figure


def predictions(data, rng, detector):
    """Nine validation pictures with what is found in them."""
    figure, axes = panels(3, 3, 7.4)
    for ax, index in zip(axes, pick(data, rng, 9, fewest=2, most=6), strict=False):
        image = data.read(index)
        found = detector([image], score_threshold=0.4)[0]
        shown = Image.fromarray(image)
        shown.thumbnail((260, 236))  # as many pixels as a panel has, so that labels stay legible
        found["boxes"] = found["boxes"] * shown.width / image.shape[1]
        ax.imshow(draw_detections(np.asarray(shown), **found, classes=detector.classes))
    for ax in axes:
        ax.axis("off")
    return figure


def main():
    """Draw them one by one."""
    args = parse_args()
    detector = args.pretrained_model and Detector.load(args.pretrained_model, "cpu")
    name = detector.name if detector else args.model or "ssdlite"
    if args.model not in (None, name):
        raise UserError(f"--model {args.model}: {args.pretrained_model} is {name}; leave it away")
    train_set = CocoDataset(args.data_path, args.train_set)
    if detector and detector.classes != train_set.classes:
        raise UserError(
            f"--pretrained-model {args.pretrained_model}: finds other classes than those of"
            f" {train_set.annotation_file}: leave it away, or train one on them"
        )
    folder = Path(args.output)
    usage.make_writable("--output", folder / "default_boxes.jpg")

    def draw(function, *given):
        # Each figure draws its own random numbers: one more of them changes no other.
        figure = function(*given)
        path = folder / f"{function.__name__}.jpg"
        figure.savefig(path, dpi=100, pil_kwargs={"quality": 85})
        plt.close(figure)
        print(path)

    torch.manual_seed(args.seed)
    network = detector.model if detector else build_model(name, len(train_set.classes), False)
    for function in (default_boxes, matching, augmentation):
        draw(function, train_set, np.random.default_rng(args.seed), name)
    state = "trained" if detector else "untrained"
    draw(hard_negatives, train_set, np.random.default_rng(args.seed), name, network, state)
    if detector:
        val_set = CocoDataset(args.data_path, args.val_set)
        draw(before_and_after_nms, val_set, np.random.default_rng(args.seed), detector)
        draw(precision_recall, val_set, detector)
        draw(predictions, val_set, np.random.default_rng(args.seed), detector)


if __name__ == "__main__":
    usage.run(main)
