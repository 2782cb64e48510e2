"""Write a checkpoint's detector to one ONNX file that needs neither torch nor this repository.

    python export.py --pretrained-model trained_models/ssd.pth --output ssd.onnx

In: `image` uint8 (H, W, 3) RGB of any size; `score_threshold` and `nms_threshold`, float32 scalars
that may be left out. Out: `boxes` float32 (N, 4) xyxy in pixels of that image, `labels` int64 (N,)
from 1, `scores` float32 (N,) descending; N <= 200. Metadata: `model`, and `classes` as a JSON list,
index 0 "background".

With --network-only, for runtimes that lack an operator of the above. In: `pixels` float32 (1, 300, 300, 3) RGB,
0 to 255. Out, before NMS: `boxes` float32 (D, 4) xyxy in [0, 1] but not clipped, `scores` float32 (K, D) of the K
classes without background.
"""

import json
import sys

import torch
from torch import nn

from src import usage
from src.boxes import MAX_DETECTIONS, NMS_THRESHOLD
from src.detector import SHOW_THRESHOLD, Detector
from src.transform import normalize

try:
    import onnx
    import onnxscript  # noqa: F401, torch.onnx.export needs it
except ModuleNotFoundError as error:
    sys.exit(usage.complain(f"{error.name} is missing: pip install -r requirements-export.txt"))

OPSET = 18  # the first whose Resize has antialiasing
IR_VERSION = 10  # of the file format; what torch writes
HEADER = f'<ir_version: {IR_VERSION}, opset_import: ["": {OPSET}]>\n'

# What comes before the network, in ONNX's own notation. `exclude_outside`: the weights of pixels
# beyond the border are left out, as torch and Pillow do, not given to the border's pixels.
BEFORE = """
before (uint8[H, W, 3] image) => (uint8[1, SIZE, SIZE, 3] pixels, int64[3] shape)
{
    size = Constant <value_ints = [SIZE, SIZE]> ()
    first_axis = Constant <value_ints = [0]> ()
    resized = Resize <mode = "linear", coordinate_transformation_mode = "half_pixel",
                      antialias = 1, exclude_outside = 1, axes = [0, 1]> (image, , , size)
    pixels = Unsqueeze (resized, first_axis)
    shape = Shape (image)
}
"""

# What comes after it: Encoder.decode. To keep NMS to the best 200 of each class (K classes without
# background), the classes are for NonMaxSuppression a batch of K images of one class.
AFTER = """
after (float[D, 4] all_boxes, float[K, D] all_scores, int64[3] shape,
       float score_threshold = {SHOW_THRESHOLD}, float nms_threshold = {NMS_THRESHOLD})
    => (float[N, 4] boxes, int64[N] labels, float[N] scores)
{
    most = Constant <value_ints = [MAX_DETECTIONS]> ()
    one = Constant <value_ints = [1]> ()
    class_scores, best = TopK (all_scores, most)                        # (K, most) both
    class_boxes = Gather (all_boxes, best)                              # (K, most, 4)
    nms_scores = Unsqueeze (class_scores, one)                          # (K, 1, most)
    kept = NonMaxSuppression (class_boxes, nms_scores, most, nms_threshold, score_threshold)
    kept_class, zero, kept_rank = Split <axis = 1, num_outputs = 3> (kept)  # (M, 1) each
    place = Concat <axis = 1> (kept_class, kept_rank)                   # (M, 2)
    kept_boxes = GatherND (class_boxes, place)                          # (M, 4)
    kept_scores = GatherND (class_scores, place)                        # (M,)

    found = Shape (kept_scores)
    number = Min (found, most)
    scores, order = TopK (kept_scores, number)                          # (N,) both
    label_column = Gather (kept_class, order)                           # (N, 1), from 0
    label_from_0 = Squeeze (label_column, one)
    labels = Add (label_from_0, one)

    low = Constant <value_float = 0.0> ()
    high = Constant <value_float = 1.0> ()
    relative_boxes = Gather (kept_boxes, order)
    clipped_boxes = Clip (relative_boxes, low, high)
    width_height_twice = Constant <value_ints = [1, 0, 1, 0]> ()        # of shape: H, W, 3
    sides = Gather (shape, width_height_twice)
    float_sides = Cast <to = 1> (sides)                                 # 1: float32
    boxes = Mul (clipped_boxes, float_sides)
}
"""


def parse(text, **values):
    """The ONNX model of HEADER and `text`, in which each name of `values` stands for its value."""
    for name, value in values.items():
        text = text.replace(name, str(value))
    return onnx.parser.parse_model(HEADER + text)


class Exported(nn.Module):
    """The part that torch exports: from resized pixels to the boxes and scores of all classes."""

    def __init__(self, detector):
        super().__init__()
        self.network = detector.network
        self.encoder = detector.encoder

    def forward(self, pixels):
        """(1, 300, 300, 3) uint8 or float32 -> (D, 4) xyxy in [0, 1] but not clipped, (K, D) scores."""
        loc, cls_logits = self.network(normalize(pixels))
        return self.encoder.apply_offsets(loc[0]), cls_logits[0].softmax(dim=1)[:, 1:].T


def export(detector, network_only=False):
    """Return the ONNX model (onnx.ModelProto) of a Detector on the CPU, in float32; or of its network alone."""
    network = Exported(detector).eval()
    dtype = torch.float32 if network_only else torch.uint8
    pixels = torch.zeros(1, detector.size, detector.size, 3, dtype=dtype)
    normalize(pixels)  # which keeps its constants: real ones, not the tracer's
    outputs = ["boxes", "scores"] if network_only else ["all_boxes", "all_scores"]
    program = torch.onnx.export(
        network,
        (pixels,),
        dynamo=True,
        opset_version=OPSET,
        verbose=False,
        input_names=["pixels"],
        output_names=outputs,
    )
    onnx_model = program.model_proto
    onnx_model.ir_version = IR_VERSION
    for node in onnx_model.graph.node:
        node.ClearField("metadata_props")  # paths and lines of the source on this machine
    if not network_only:
        before = parse(BEFORE, SIZE=detector.size)
        after = parse(AFTER, SHOW_THRESHOLD=SHOW_THRESHOLD, NMS_THRESHOLD=NMS_THRESHOLD, MAX_DETECTIONS=MAX_DETECTIONS)
        onnx_model = onnx.compose.merge_models(before, onnx_model, [("pixels", "pixels")])
        onnx_model = onnx.compose.merge_models(onnx_model, after, [(name, name) for name in (*outputs, "shape")])
        del onnx_model.opset_import[1:]  # merging repeats it
    about = {"model": detector.name, "classes": json.dumps(detector.classes)}
    onnx.helper.set_model_props(onnx_model, about)
    onnx.checker.check_model(onnx_model, full_check=True)
    return onnx_model


def main():
    parser = usage.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--pretrained-model", required=True, help="checkpoint from train.py, or a published one")
    add("--output", required=True, help="file to write, FILE.onnx")
    add("--network-only", action="store_true", help="from resized pixels to boxes and scores, without resizing and NMS")
    args = parser.parse_args()
    usage.prepare_outputs([("--output", args.output)], [args.pretrained_model])
    detector = Detector.load(args.pretrained_model, device="cpu")
    print(f"{args.pretrained_model}: {detector.origin}")
    onnx.save(export(detector, args.network_only), args.output)
    print(f"{detector.name}, {len(detector.classes) - 1} classes -> {args.output}")


if __name__ == "__main__":
    usage.run(main)
