"""Time every stage against a reference, in one run on one machine.

    python -m tools.benchmark
    python -m tools.benchmark --amp --repeats 15

The reference is float32, contiguous, batch norm on its own, Pillow and torchvision's transforms, IoU
with all default boxes at once, NMS in Python loops over classes and boxes, mining with two sorts. The
limit is the speed of the machine's own matrix products.

On a GPU the first rows compare memory layouts: where NCHW (contiguous) is much faster than NHWC
(channels_last, which all scripts use), cuDNN lacks a good kernel for that GPU and precision.
"""

import contextlib
import copy
import io
import math
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms
from torchvision.models.detection import ssdlite320_mobilenet_v3_large
from torchvision.ops import box_iou
from torchvision.transforms.functional import to_tensor

from demo import shapes
from src import usage
from src.annotations import load_ground_truth
from src.boxes import Encoder, box_cxcywh_to_xyxy, make_default_boxes
from src.checkpoint import Run, save_checkpoint
from src.dataset import CocoDataset
from src.detector import Detector
from src.distributed import choose_device
from src.engine import compute_metrics, evaluate, make_optimizer, train_steps
from src.images import read_image
from src.loss import MultiBoxLoss
from src.model import build_model
from src.transform import IMAGENET_MEAN, IMAGENET_STD, augment, normalize, resize, sample_patch

CLASSES = 81  # COCO's 80 and background
NAMES = ["background", *map(str, range(1, CLASSES))]
IDS = list(range(1, CLASSES))
REFERENCE_PIXELS = transforms.Compose([transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)])
REFERENCE_COLORS = transforms.ColorJitter(0.125, 0.5, 0.5, 0.05)


def parse_args():
    parser = usage.ArgumentParser(description=__doc__)
    positive = usage.number(int, 1)
    parser.add_argument("--repeats", type=positive, default=7, help="pairs of timings per stage")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda if there is such a GPU")
    parser.add_argument("--amp", action="store_true", help="ours in mixed precision; the reference stays in float32")
    parser.add_argument("--images", type=positive, default=50, help="of the validation stage")
    return parser.parse_args()


# The reference


def reference_encode(default_boxes, boxes, labels):
    """Targets of objects, with the whole (D, G) table of overlaps."""
    overlaps = box_iou(box_cxcywh_to_xyxy(default_boxes), boxes)
    best, matched = overlaps.max(dim=1)
    for g, d in enumerate(overlaps.argmax(dim=0)):
        matched[d], best[d] = g, 1.0
    objects = boxes[matched]
    centers, sizes = (objects[:, :2] + objects[:, 2:]) / 2, objects[:, 2:] - objects[:, :2]
    loc = torch.cat(
        [(centers - default_boxes[:, :2]) / default_boxes[:, 2:] / 0.1, (sizes / default_boxes[:, 2:]).log() / 0.2],
        dim=1,
    )
    return loc, labels[matched] * (best > 0.5)


def reference_sample(path, boxes, labels, default_boxes, rng):
    """Read, crop, flip, resize, colors, tensor, encode."""
    image = Image.open(path).convert("RGB")
    patch = sample_patch(boxes, rng)
    if patch is not None:
        left, top = patch[0] * image.width, patch[1] * image.height
        image = image.crop((left, top, patch[2] * image.width, patch[3] * image.height))
        inside = ((boxes[:, :2] + boxes[:, 2:]) / 2 > patch[:2]).all(axis=1)
        inside &= ((boxes[:, :2] + boxes[:, 2:]) / 2 < patch[2:]).all(axis=1)
        origin, side = np.tile(patch[:2], 2), np.tile(patch[2:] - patch[:2], 2)
        boxes, labels = ((boxes[inside] - origin) / side).clip(0, 1), labels[inside]
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    image = REFERENCE_COLORS(image.resize((300, 300), Image.Resampling.BILINEAR))
    boxes, labels = torch.tensor(boxes, dtype=torch.float32), torch.tensor(labels)
    return REFERENCE_PIXELS(image), *reference_encode(default_boxes, boxes, labels)


def reference_nms(boxes, scores, threshold):
    """Indices of the boxes kept; greedy, one box at a time."""
    order = scores.argsort(descending=True)
    keep = []
    while len(order):
        keep.append(order[0])
        order = order[1:][box_iou(boxes[order[:1]], boxes[order[1:]])[0] <= threshold]
    return torch.stack(keep)


def reference_decode(default_boxes, loc, cls_logits):
    """Detections of a batch, image by image and class by class."""
    found = []
    for offsets, scores in zip(loc, cls_logits.softmax(dim=2), strict=True):
        centers = default_boxes[:, :2] + offsets[:, :2] * 0.1 * default_boxes[:, 2:]
        sizes = default_boxes[:, 2:] * (offsets[:, 2:] * 0.2).exp()
        boxes = box_cxcywh_to_xyxy(torch.cat([centers, sizes], dim=1))
        rows = [torch.zeros(0, 6)]
        for label in range(1, scores.shape[1]):
            candidates = (scores[:, label] > 0.01).nonzero()[:, 0]
            candidates = candidates[scores[candidates, label].argsort(descending=True)[:200]]
            if len(candidates):
                keep = candidates[reference_nms(boxes[candidates], scores[candidates, label], 0.5)]
                columns = boxes[keep].clamp(0, 1), scores[keep, label, None]
                rows.append(torch.cat([*columns, torch.full((len(keep), 1), label)], dim=1))
        rows = torch.cat(rows)
        found.append(rows[rows[:, 4].argsort(descending=True)[:200]])
    return found


def reference_loss(loc, cls_logits, loc_targets, cls_targets):
    """The MultiBox loss, hard negatives found with two full sorts."""
    matched = cls_targets > 0
    loc_loss = F.smooth_l1_loss(loc[matched], loc_targets[matched], reduction="sum")
    losses = F.cross_entropy(cls_logits.transpose(1, 2), cls_targets, reduction="none")
    _, order = losses.masked_fill(matched, 0).sort(dim=1, descending=True)
    _, rank = order.sort(dim=1)
    hardest = rank < 3 * matched.sum(dim=1, keepdim=True)
    return (loc_loss + losses[matched | hardest].sum()) / matched.sum().clamp(min=1)


# Measuring


def seconds(action):
    """Seconds that one call takes; on a GPU, until it has finished."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def header(stage, reference, ours):
    """Print what the columns of `compare` are."""
    print(f"\n{stage:42} {reference:>9} {ours:>9} {'images/s':>9} {'ratio':>8} of limit")


def compare(stage, images, reference, ours, repeats, limit=None):
    """Print a row: medians of alternating calls, so that both meet the same machine."""
    reference(), ours()
    pairs = [(seconds(reference), seconds(ours)) for _ in range(repeats)]
    before, now = np.median(pairs, axis=0)
    share = f"{limit / now:6.0%}" if limit else "     -"
    print(
        f"{stage:42} {1e3 * before:9.1f} {1e3 * now:9.1f} {images / now:9.1f} {before / now:7.2f}x {share}", flush=True
    )


def peak(dtype, device):
    """Floating point operations per second of a large matrix product."""
    a, b = (torch.randn(2048, 2048).to(device, dtype) for _ in range(2))
    a @ b
    return 2 * 2048**3 / min(seconds(lambda: a @ b) for _ in range(7))


def operations(network, images):
    """Floating point operations of a forward pass."""
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        network(images)
    return counter.get_total_flops()


def scores_like(objects):
    """Outputs (1, 8732, 4), (1, 8732, 81) like those of a trained SSD that sees this many objects."""
    default_boxes = make_default_boxes("ssd")
    generator = torch.Generator().manual_seed(0)
    loc = torch.randn(1, len(default_boxes), 4, generator=generator)
    logits = torch.randn(1, len(default_boxes), CLASSES, generator=generator)
    logits[..., 0] += 11
    for n in range(objects):  # the default boxes around each one respond, some of them with high scores
        center = torch.rand(2, generator=generator)
        near = (default_boxes[:, :2] - center).norm(dim=1) < 0.06
        logits[0, near, 1 + n % (CLASSES - 1)] += 6 + 4 * torch.rand(int(near.sum()), generator=generator)
    return loc, logits


def drawn_images(count):
    """Images (480, 640, 3) uint8 RGB of drawn shapes."""
    scenes = (shapes.draw_scene(np.random.default_rng(n))[0] for n in range(count))
    return [np.array(Image.fromarray(scene).resize((640, 480))) for scene in scenes]


def look_trained(network, classify, backgrounds):
    """Make random weights score like trained ones: mostly background, some 200 candidates per image.

    classify() gives the network's cls_logits (B, D, CLASSES) of some images; backgrounds are the
    heads' biases of class 0.
    """
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0  # adopt the next batch's statistics: the initial ones let hardly any signal through
    with torch.no_grad():
        network.train()
        classify()
        network.eval()
        logits = classify()
        lead = (logits[..., 1:] - logits[..., :1]).flatten()
        last = lead.topk(200 * len(logits)).values[-1]
        for bias in backgrounds:
            bias += last - math.log(0.01)  # now the last one scores the threshold, 0.01


def network_of(name, device):
    """A network of random weights that scores drawn images like a trained one, in eval mode."""
    torch.manual_seed(0)
    network = build_model(name, CLASSES, pretrained_backbone=False).to(device)
    images = normalize(torch.from_numpy(np.stack([resize(image, 300) for image in drawn_images(8)])).to(device))
    heads = [head if hasattr(head, "bias") else head[-1] for head in network.conf]
    look_trained(network, lambda: network(images)[1], [head.bias.view(CLASSES, -1)[0] for head in heads])
    return network


# Stages


def inference(args, device, limit, name, batch):
    """A forward pass, and the whole call from pixels to detections."""
    network = network_of(name, device)
    default_boxes = make_default_boxes(name)
    detector = Detector(network, name, NAMES, IDS, device, args.amp)
    images = torch.randn(batch, 3, 300, 300, device=device)
    fast = images.to(detector.dtype, memory_format=torch.channels_last)
    pixels = drawn_images(batch)

    def reference():
        resized = [Image.fromarray(p).resize((300, 300), Image.Resampling.BILINEAR) for p in pixels]
        loc, logits = network(torch.stack([REFERENCE_PIXELS(p) for p in resized]).to(device))
        reference_decode(default_boxes, loc.cpu(), logits.cpu())

    with torch.inference_mode():
        compare(
            f"{name} forward, batch {batch}",
            batch,
            lambda: network(images),
            lambda: detector.network(fast),
            args.repeats,
            operations(network, images) / limit,
        )
        found = sum(len(detections["scores"]) for detections in detector(pixels))
        stage = f"{name} batch {batch}, pixels to {found} detections"
        compare(stage, batch, reference, lambda: detector(pixels), args.repeats)


def decoding(args, stage, loc, cls_logits):
    """From the network's output to boxes."""
    default_boxes = make_default_boxes("ssd")
    encoder = Encoder(default_boxes)
    compare(
        f"decode, {stage}",
        1,
        lambda: reference_decode(default_boxes, loc, cls_logits),
        lambda: encoder.decode(loc, cls_logits),
        args.repeats,
    )


def sample(args, folder, width, height):
    """A training sample from a JPEG of width x height pixels, on one core."""
    default_boxes = make_default_boxes("ssd")
    encoder = Encoder(default_boxes)
    boxes = np.array([[0.1, 0.2, 0.5, 0.7], [0.4, 0.4, 0.9, 0.9]], np.float32)
    labels = np.array([1, 2])
    path = folder / "sample.jpg"
    noise = np.random.default_rng(0).integers(0, 256, (height // 4, width // 4, 3), np.uint8)
    image = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
    image.save(path, quality=80)
    draws, again = np.random.default_rng(0), np.random.default_rng(0)

    def ours():
        image, found, kept = augment(read_image(path), boxes, labels, again, 300)
        encoder.encode(torch.from_numpy(found), torch.from_numpy(kept))

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    compare(
        f"training sample, {width}x{height}, {path.stat().st_size // 1000} kB, one core",
        1,
        lambda: reference_sample(path, boxes, labels, default_boxes, draws),
        ours,
        10 * args.repeats,
    )
    torch.set_num_threads(threads)


def batch_of(name, size=8):
    """Pixels, targets and image ids of a training batch, one object per image."""
    encoder = Encoder(make_default_boxes(name))
    targets = encoder.encode(torch.tensor([[0.2, 0.2, 0.7, 0.8]]), torch.tensor([3]))
    pixels = torch.randint(0, 256, (size, 300, 300, 3), dtype=torch.uint8)
    return pixels, *(t.expand(size, *t.shape) for t in targets), torch.arange(size)


def training_step(args, device, name, layout=torch.channels_last):
    """Return a function that takes one training step on a batch of 8 as train.py does, in one memory layout."""
    network = network_of(name, device).to(memory_format=layout)
    network.register_forward_pre_hook(lambda _, inputs: inputs[0].contiguous(memory_format=layout))
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp and device.type == "cuda")
    run = Run(name, network, make_optimizer(network), scaler, [], [], {})
    loader = [batch_of(name)]
    settings = {"criterion": MultiBoxLoss(), "schedule": lambda *_: 1e-4, "amp": args.amp}

    def step():
        epoch = train_steps(run, loader, network=network, **settings)
        cudnn = torch.backends.cudnn.flags(enabled=True, benchmark=True)  # as train.py has it
        with cudnn, contextlib.redirect_stderr(io.StringIO()):  # the progress bar
            list(epoch)

    return step


def layouts(args, device, name):
    """A forward pass and a training step with a batch of 8, contiguous against channels_last."""
    # In channels_last, cuDNN can be 35 times slower at float32 depthwise convolutions.
    both = torch.contiguous_format, torch.channels_last
    detector = Detector(network_of(name, device), name, NAMES, IDS, device, args.amp)
    models = [copy.deepcopy(detector.network).to(memory_format=layout) for layout in both]
    images = torch.randn(8, 3, 300, 300, device=device, dtype=detector.dtype)
    images = [images.contiguous(memory_format=layout) for layout in both]
    with torch.inference_mode():
        compare(f"{name} forward, batch 8", 8, *map(partial, models, images), args.repeats)
    steps = [training_step(args, device, name, layout) for layout in both]
    compare(f"{name} training step, batch 8", 8, *steps, args.repeats)


def training(args, device, name):
    """A training step with a batch of 8, and the loss alone."""
    network = network_of(name, device).train()
    criterion = MultiBoxLoss()
    targets = [t.to(device) for t in batch_of(name)[1:3]]
    images = torch.randn(8, 3, 300, 300, device=device)
    optimizer = torch.optim.SGD(network.parameters(), 1e-4, momentum=0.9, weight_decay=5e-4, foreach=False)

    def reference():
        loss = reference_loss(*network(images), *targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()

    ours = training_step(args, device, name)
    compare(f"{name} training step, batch 8", 8, reference, ours, min(args.repeats, 5))
    outputs = [torch.randn(*targets[1].shape, n, device=device) for n in (4, CLASSES)]
    compare(
        f"{name} loss, batch 8",
        8,
        lambda: reference_loss(*outputs, *targets),
        lambda: criterion(*outputs, *targets),
        args.repeats,
    )


def validation(args, device, folder, name):
    """Evaluating a whole set: images in, COCO metrics out."""
    data = CocoDataset(folder, "val2017")
    ground_truth = load_ground_truth(data.annotation_file)
    network = network_of(name, device)
    names = [*data.classes, *map(str, range(CLASSES - len(data.classes)))]
    ids = [*data.category_ids, *range(100, 100 + CLASSES - len(data.classes))]
    default_boxes = make_default_boxes(name)
    loader = DataLoader(data, 8, num_workers=2, persistent_workers=True)  # as train.py has it

    @torch.inference_mode()
    def reference():
        detections = {}
        for index in range(len(data)):
            image = Image.open(data.path(index)).convert("RGB")
            pixels = REFERENCE_PIXELS(image.resize((300, 300), Image.Resampling.BILINEAR))
            loc, logits = network(pixels[None].to(device))
            (found,) = reference_decode(default_boxes, loc.cpu(), logits.cpu())
            boxes = found[:, :4] * torch.tensor([image.width, image.height] * 2)
            scores, labels = found[:, 4], found[:, 5].long()
            detections[int(data.image_ids[index])] = {"boxes": boxes, "labels": labels, "scores": scores}
        compute_metrics(ground_truth, detections, ids)

    def ours():
        detector = Detector(network, name, names, ids, device, args.amp)
        with contextlib.redirect_stderr(io.StringIO()):  # the progress bar
            evaluate(detector, loader, ground_truth)

    compare(f"{name} validation of {len(data)} images", len(data), reference, ours, 3)


def torchvision_peer():
    """Return torchvision's SSDLite (320 x 320) with random weights that score like trained ones."""
    torch.manual_seed(0)
    peer = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=CLASSES)
    images = peer.transform([to_tensor(image) for image in drawn_images(8)])[0].tensors
    heads = [head[1] for head in peer.head.classification_head.module_list]
    look_trained(
        peer,
        lambda: peer.head(list(peer.backbone(images).values()))["cls_logits"],
        [head.bias.view(-1, CLASSES)[:, 0] for head in heads],
    )
    return peer


def export_onnx(network, folder):
    """Write a network's ONNX file with export.py; return its path."""
    checkpoint = folder / "ssdlite.pth"
    file = folder / "ssdlite.onnx"
    state = {"model": "ssdlite", "model_state_dict": network.state_dict()}
    save_checkpoint(checkpoint, state | {"classes": NAMES, "category_ids": IDS})
    command = [sys.executable, "export.py", "--pretrained-model", checkpoint, "--output", file]
    subprocess.run(command, cwd=Path(__file__).parents[1], check=True, stdout=subprocess.DEVNULL)
    return file


def deployment(args, folder):
    """One image from pixels to detections on the CPU: `Detector`, its ONNX file, and torchvision's SSDLite."""
    try:
        import onnxruntime
    except ModuleNotFoundError:
        print("\nONNX Runtime is missing, not timed: pip install -r requirements-export.txt")
        return
    network = network_of("ssdlite", "cpu")
    peer = torchvision_peer()
    detector = Detector(network, "ssdlite", NAMES, IDS, "cpu")
    half = Detector(network, "ssdlite", NAMES, IDS, "cpu", amp=True)
    file = export_onnx(network, folder)
    (pixels,) = drawn_images(1)
    inputs = {"image": pixels, "score_threshold": np.array(0.01, np.float32)}  # Detector's own
    found = len(detector([pixels])[0]["scores"])
    theirs = len(peer([to_tensor(pixels)])[0]["scores"])
    print(f"\n{f'ssdlite batch 1, pixels to {found} detections':42} {'threads':>9} {'ms':>9} {'ratio':>9}")
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(file, options)
        ways = {
            "Detector, float32": lambda: detector([pixels]),
            "Detector, --amp": lambda: half([pixels]),
            "Detector's ONNX file in ONNX Runtime": partial(session.run, None, inputs),
            f"torchvision's ssdlite320, to {theirs}": lambda: peer([to_tensor(pixels)]),
        }
        # Call each twice and time the second: by then the threads of the one before have stopped spinning.
        with torch.inference_mode():
            rounds = [[(way(), seconds(way))[1] for way in ways.values()] for _ in range(args.repeats)]
        times = np.median(rounds, axis=0)
        for way, took in zip(ways, times, strict=True):
            print(f"{way:42} {threads:9} {1e3 * took:9.1f} {times[0] / took:8.2f}x", flush=True)
    torch.set_num_threads(before)


def main():
    args = parse_args()
    device = choose_device(args.device)
    half = torch.get_autocast_dtype(device.type) if args.amp else torch.float32
    limit = peak(half, device)
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"matrix products: {limit / 1e9:.0f} GFLOP/s in {half}; times in ms")
    if device.type == "cuda":
        header(f"memory layouts, {half}", "NCHW", "NHWC")
        for name in ("ssd", "ssdlite"):
            layouts(args, device, name)
    header("stage", "reference", "ours")
    with tempfile.TemporaryDirectory() as folder:
        for size in ((640, 480), (1632, 1224), (4000, 3000)):
            sample(args, Path(folder), *size)
        for objects in (5, 30):
            decoding(args, f"trained, {objects} objects", *scores_like(objects))
        decoding(args, "untrained", *(0.3 * torch.randn(1, 8732, n) for n in (4, CLASSES)))
        for name, batch in (("ssd", 1), ("ssdlite", 1), ("ssdlite", 8)):
            inference(args, device, limit, name, batch)
        for name in ("ssd", "ssdlite"):
            training(args, device, name)
        shapes.make_dataset(folder, train=0, val=args.images)
        for name in ("ssd", "ssdlite"):
            validation(args, device, folder, name)
        deployment(args, Path(folder))


if __name__ == "__main__":
    usage.run(main)
