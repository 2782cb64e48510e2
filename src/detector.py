"""From a checkpoint, or a network in training, to a callable detector."""

import copy
import itertools
import math

import numpy as np
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.ops import batched_nms

from src import usage
from src.boxes import DEFAULT_BOXES, NMS_THRESHOLD, SCORE_THRESHOLD, Encoder, make_default_boxes
from src.checkpoint import load_checkpoint, network_from
from src.distributed import amp_note, choose_device
from src.transform import normalize, resize

# Lowest scores of what is shown by default: in images, in a video, and in a data set's images.
SHOW_THRESHOLD = 0.3
VIDEO_THRESHOLD = 0.35
DATASET_THRESHOLD = 0.5


def add_options(parser, cls_threshold, cls_help="lowest score to show"):
    """Add the options of a script's Detector to its parser."""
    share = usage.number(float, 0, 1)
    add = parser.add_argument
    add("--pretrained-model", required=True, help="checkpoint from train.py, or a published one")
    add("--cls-threshold", type=share, default=cls_threshold, help=cls_help)
    add("--nms-threshold", type=share, default=NMS_THRESHOLD, help="IoU above which a weaker box is removed")
    add("--device", help="cpu, cuda, cuda:1 or mps (default: the CUDA GPU if there is one)")
    add("--amp", action="store_true", help="half precision: float16 on a GPU, bfloat16 on a CPU")


class Detector:
    """detector(images) -> detections; `Detector.load(path)` makes one from a checkpoint.

    The network is copied, its batch norms folded; `name` is "ssd" or "ssdlite". `classes` are the names,
    index 0 "background"; label k is COCO category `category_ids[k - 1]`; `origin` says for the user
    where the weights are from.
    """

    def __init__(self, network, name, classes, category_ids, device=None, amp=False, origin="a network in memory"):
        self.device = choose_device(device)
        self.dtype = torch.get_autocast_dtype(self.device.type) if amp else torch.float32
        network = fold_batch_norm(copy.deepcopy(network).eval())
        for module in network.modules():
            if isinstance(module, nn.ReLU6):
                module.inplace = True  # faster, and nothing is trained here
        self.network = network.to(self.device, self.dtype, memory_format=torch.channels_last)
        self.encoder = Encoder(make_default_boxes(name).to(self.device))
        self.size = DEFAULT_BOXES[name].input_size
        self.name = name
        self.classes = classes
        self.category_ids = category_ids
        self.origin = origin

    @classmethod
    def load(cls, path, device=None, amp=False):
        """Detector of the checkpoint at `path`; device: as `choose_device` takes it.

        amp: half precision (float16 on a GPU, bfloat16 on a CPU). UserError if it cannot be loaded.
        """
        state = load_checkpoint(path)
        network = network_from(state, path)
        origin = state["origin"] + amp_note(choose_device(device), amp)
        return cls(network, state["model"], state["classes"], state["category_ids"], device, amp, origin)

    def __call__(self, images, score_threshold=SCORE_THRESHOLD, nms_threshold=NMS_THRESHOLD):
        """Detect in a list of (H, W, 3) uint8 RGB images of any sizes.

        Returns a list of {boxes (K, 4) float32 xyxy in pixels, labels (K,) int64 from 1, scores
        (K,) descending}, on the CPU, K <= 200.
        """
        if not images:
            return []
        sizes = torch.tensor([[image.shape[1], image.shape[0]] for image in images])
        pixels = torch.stack([torch.from_numpy(resize(image, self.size)) for image in images])
        return self.detect_resized(pixels, sizes, score_threshold, nms_threshold)

    @torch.inference_mode()
    def detect_resized(self, pixels, sizes, score_threshold=SCORE_THRESHOLD, nms_threshold=NMS_THRESHOLD):
        """The same for images at the network's size: pixels (B, size, size, 3) uint8.

        sizes (B, 2): width and height in pixels that the boxes are scaled to.
        """
        images = normalize(pixels.to(self.device, non_blocking=True)).to(self.dtype)
        loc, cls_logits = self.network(images)
        found = self.encoder.decode(loc, cls_logits, score_threshold, nms_threshold)
        found = [{key: value.cpu() for key, value in detections.items()} for detections in found]
        for detections, size in zip(found, sizes, strict=True):
            detections["boxes"] = detections["boxes"] * size.repeat(2)
        return found


def detect_in_tiles(detector, image, side, score_threshold=SCORE_THRESHOLD, nms_threshold=NMS_THRESHOLD):
    """Detect in an image (H, W, 3) as a whole and in tiles of it, side x side pixels: small objects are larger there.

    Returns what `detector([image])[0]` does, K unlimited, after NMS over all of them. Neighboring tiles share
    half of their side or more. A box at a tile's border inside the image is left out: its object continues there.
    """
    height, width = image.shape[:2]
    tiles = [(0, 0, max(height, width))]  # left, top, size
    if side < max(height, width):
        tiles += itertools.product(tile_starts(width, side), tile_starts(height, side), [side])
    found = []
    for left, top, size in tiles:
        (here,) = detector([image[top : top + size, left : left + size]], score_threshold, nms_threshold)
        boxes = here["boxes"] + torch.tensor([left, top, left, top])
        margin = 2 * size / detector.size  # two pixels of the network
        starts = torch.tensor([left, top])
        ends = starts + size
        cut = (boxes[:, :2] < starts + margin) & (starts > 0)
        cut |= (boxes[:, 2:] > ends - margin) & (ends < torch.tensor([width, height]))
        found.append([values[~cut.any(dim=1)] for values in (boxes, here["labels"], here["scores"])])
    boxes, labels, scores = map(torch.cat, zip(*found, strict=True))
    best = batched_nms(boxes, scores, labels, nms_threshold)
    return {"boxes": boxes[best], "labels": labels[best], "scores": scores[best]}


def tile_starts(length, side):
    """Where tiles of `side` pixels start that cover `length` pixels, evenly spread."""
    room = max(0, length - side)
    return np.linspace(0, room, 1 + math.ceil(2 * room / side)).astype(int).tolist()


def fold_batch_norm(module):
    """Fold each batch norm that follows a convolution into it, in place: the same results, faster."""
    children = list(module.named_children())
    for (name, conv), (next_name, norm) in itertools.pairwise(children):
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            setattr(module, name, fuse_conv_bn_eval(conv, norm))
            setattr(module, next_name, nn.Identity())
    for _, child in children:
        fold_batch_norm(child)
    return module


def keep_above(threshold, detections):
    """Those of one image's detections that score above `threshold`."""
    return {key: values[detections["scores"] > threshold] for key, values in detections.items()}


def json_entry(image, found, classes):
    """One image's entry in the JSON output; boxes [xmin, ymin, xmax, ymax] in pixels."""
    boxes, labels, scores = (found[key].tolist() for key in ("boxes", "labels", "scores"))
    return {
        "width": image.shape[1],
        "height": image.shape[0],
        "detections": [
            {"label": classes[label], "score": score, "box": box}
            for box, label, score in zip(boxes, labels, scores, strict=True)
        ],
    }
