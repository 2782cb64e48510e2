"""The logs of a run, TensorBoard's and metrics.jsonl. Only the main process writes: in the others the log is None."""

import json

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from src.classes import to_category_ids, to_labels
from src.detector import SHOW_THRESHOLD, keep_above
from src.distributed import is_main_process
from src.engine import METRICS
from src.visualize import draw_detections


def open_log(folder, run, samples_per_step, steps_per_epoch):
    """The log in `folder`; what was written to it after the point where `run` is resumed is hidden."""
    if not is_main_process():
        return None
    step = run.epoch * steps_per_epoch + run.samples_seen // samples_per_step
    # At the end of an epoch the metrics of its evaluation are at `step` itself, and stay.
    evaluated = run.epoch > 0 and run.samples_seen == 0
    return SummaryWriter(folder, purge_step=step + int(evaluated))


def write(log, group, numbers, step):
    """Write {tag: number}."""
    if log:
        for tag, number in numbers.items():
            log.add_scalar(f"{group}/{tag}", number, step)
        log.flush()


def append_line(file, entry):
    """Append `entry` to a file of one JSON object per line, from the main process."""
    if is_main_process():
        with open(file, "a", encoding="utf-8") as lines:
            lines.write(json.dumps(entry) + "\n")


def write_evaluation(log, metrics, detections, val_set, run, step):
    """Write COCO's twelve metrics, and what was found in the first validation images.

    detections: {image id: boxes, labels and scores}, as `evaluate` returns them; run: knows their classes.
    """
    if log:
        write(log, "Test", {"mAP" if name == "AP" else name: metrics[name] for name in METRICS}, step)
        write_images(log, detections, val_set, run, step)


def write_images(log, detections, val_set, run, step, count=4):
    """Write the first validation images: what was found, and the ground truth to its right."""
    for index in range(min(count, len(val_set))):
        image, image_id, (width, height) = val_set[index]  # at the network's size
        found = keep_above(SHOW_THRESHOLD, detections[int(image_id)])
        found["boxes"] = found["boxes"].numpy() * val_set.size / (width, height, width, height)  # from its own pixels
        boxes, labels = val_set.objects(index)
        # Labels of the validation set's own categories, perhaps fewer than the run's.
        labels = to_labels(to_category_ids(labels, val_set.category_ids), run.category_ids)
        drawn = draw_detections(image, **found, classes=run.classes)
        ground_truth = draw_detections(image, boxes * val_set.size, labels, None, run.classes)
        log.add_image(f"Test/Image_{index}", np.hstack([drawn, ground_truth]), step, dataformats="HWC")
