"""From a checkpoint, or a network in training, to a callable detector."""

import copy
import itertools

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from src.boxes import DEFAULT_BOXES, Encoder, make_default_boxes
from src.checkpoint import load_checkpoint, network_from
from src.transform import normalize, resize


class Detector:
    """detector(images) -> detections; `Detector.load(path)` makes one from a checkpoint.

    The model is copied, its batch norms folded. `classes` are the names, index 0 "background";
    label k is COCO category `category_ids[k - 1]`; a loaded one has `layout`, which says what
    kind of checkpoint it was.
    """

    def __init__(self, model, name, classes, category_ids, device=None, amp=False):
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device)
        self.dtype = torch.get_autocast_dtype(self.device.type) if amp else torch.float32
        model = fold_batch_norm(copy.deepcopy(model).eval())
        for module in model.modules():
            if isinstance(module, nn.ReLU6):
                module.inplace = True  # faster, and nothing is trained here
        self.model = model.to(self.device, self.dtype, memory_format=torch.channels_last)
        self.encoder = Encoder(make_default_boxes(name).to(self.device))
        self.size = DEFAULT_BOXES[name].input_size
        self.name, self.classes, self.category_ids = name, classes, category_ids

    @classmethod
    def load(cls, path, device=None, amp=False):
        """Detector of the checkpoint at `path`; device defaults to the GPU where there is one.

        amp: half precision (float16 on a GPU, bfloat16 on a CPU). UserError if it cannot be loaded.
        """
        state = load_checkpoint(path)
        model = network_from(state, path)
        detector = cls(model, state["model"], state["classes"], state["category_ids"], device, amp)
        detector.layout = state["layout"]
        return detector

    def __call__(self, images, score_threshold=0.01, nms_threshold=0.5):
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
    def detect_resized(self, pixels, sizes, score_threshold=0.01, nms_threshold=0.5):
        """The same for images at the network's size: pixels (B, size, size, 3) uint8.

        sizes (B, 2): width and height in pixels that the boxes are scaled to.
        """
        images = normalize(pixels.to(self.device, non_blocking=True)).to(self.dtype)
        loc, cls_logits = self.model(images)
        found = self.encoder.decode(loc, cls_logits, score_threshold, nms_threshold)
        found = [{key: value.cpu() for key, value in one.items()} for one in found]
        for one, size in zip(found, sizes, strict=True):
            one["boxes"] = one["boxes"] * size.repeat(2)
        return found


def fold_batch_norm(module):
    """Fold each batch norm that follows a convolution into it, in place: the same sums, sooner."""
    children = list(module.named_children())
    for (name, conv), (next_name, norm) in itertools.pairwise(children):
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            setattr(module, name, fuse_conv_bn_eval(conv, norm))
            setattr(module, next_name, nn.Identity())
    for _, child in children:
        fold_batch_norm(child)
    return module


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
