"""The logs of a run, TensorBoard's and metrics.jsonl. Only the main process writes: in the others the log is None."""

import json

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter

from src.classes import to_category_ids, to_labels
from src.detector import SHOW_THRESHOLD
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


def write_evaluation(log, metrics, detector, val_set, step):
    """Write COCO's twelve metrics, and what is found in the first validation images."""
    if log:
        write(log, "Test", {"mAP" if name == "AP" else name: metrics[name] for name in METRICS}, step)
        write_images(log, detector, val_set, step)


def write_images(log, detector, val_set, step, count=4):
    """Write the first validation images: what is found, and the ground truth to its right."""
    indices = range(min(count, len(val_set)))
    images = [val_set[index][0] for index in indices]  # at the network's size
    sizes = torch.full((len(images), 2), detector.size)
    found = detector.detect_resized(torch.from_numpy(np.stack(images)), sizes, SHOW_THRESHOLD)
    for index, image, detections in zip(indices, images, found, strict=True):
        boxes, labels = val_set.objects(index)
        # Labels of the validation set's own categories, perhaps fewer than the detector's.
        labels = to_labels(to_category_ids(labels, val_set.category_ids), detector.category_ids)
        drawn = draw_detections(image, **detections, classes=detector.classes)
        truth = draw_detections(image, boxes * detector.size, labels, None, detector.classes)
        log.add_image(f"Test/Image_{index}", np.hstack([drawn, truth]), step, dataformats="HWC")
