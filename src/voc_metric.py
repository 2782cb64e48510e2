"""PASCAL VOC's metric: average precision at an IoU of 0.5, as its development kits of 2007 and 2010 define it.

For sets that `tools/voc.py` made: their annotations say which objects are `difficult`, and COCO treats
those as crowds. Boxes are COCO's (x, y, width, height). Their widths and heights count the last pixel,
as in VOC's kit, so the IoU is the kit's.
"""

from collections import defaultdict

import numpy as np
from pycocotools.mask import iou

VOC_METRICS = ("VOC07", "VOC10")


def has_difficult(ground_truth):
    """True if the annotations of `ground_truth` (pycocotools' COCO) say which objects are difficult."""
    return bool(ground_truth.anns) and all("difficult" in annotation for annotation in ground_truth.anns.values())


def voc_metrics(ground_truth, results):
    """VOC's metric of `results`, a list in COCO's results format, against `ground_truth` (pycocotools' COCO).

    Returns {"VOC07": {"mAP": mean over the classes, "per_class": {class name: AP}}, "VOC10": the same};
    a class without an object that is not difficult has no AP.
    """
    metrics = {key: {"mAP": -1.0, "per_class": {}} for key in VOC_METRICS}
    by_category = defaultdict(list)
    for result in results:
        by_category[result["category_id"]].append(result)
    for category in ground_truth.loadCats(ground_truth.getCatIds()):
        objects = ground_truth.loadAnns(ground_truth.getAnnIds(catIds=[category["id"]]))
        num_objects = sum(not annotation["iscrowd"] for annotation in objects)
        if num_objects:
            right = right_or_wrong(by_category[category["id"]], objects)
            recall, precision = curve(right, num_objects)
            metrics["VOC07"]["per_class"][category["name"]] = eleven_point_ap(recall, precision)
            metrics["VOC10"]["per_class"][category["name"]] = area_ap(recall, precision)
    for metric in metrics.values():
        if metric["per_class"]:
            metric["mAP"] = float(np.mean(list(metric["per_class"].values())))
    return metrics


def right_or_wrong(results, objects):
    """Of one class: whether each result is right, in descending order of score, bool (M,).

    Each is compared with the object of its image that it overlaps most. From an IoU of 0.5 it is
    right, unless a better one has found that object before; if the object is difficult, the
    detection is left out.
    """
    by_image = defaultdict(list)
    for annotation in objects:
        by_image[annotation["image_id"]].append(annotation)
    found = set()
    right = []
    for result in sorted(results, key=lambda result: -result["score"]):
        image_id = result["image_id"]
        here = by_image[image_id]
        ious = iou([result["bbox"]], [o["bbox"] for o in here], [0] * len(here))[0] if here else [0.0]
        best = int(np.argmax(ious))
        if ious[best] < 0.5:
            right.append(False)
        elif not here[best]["iscrowd"]:
            right.append((image_id, best) not in found)
            found.add((image_id, best))
    return np.array(right, bool)


def curve(right, num_objects):
    """Recall and precision, (M,) each, after each of the detections that `right_or_wrong` saw."""
    hits = right.cumsum()
    return hits / num_objects, hits / np.arange(1, len(right) + 1)


def eleven_point_ap(recall, precision):
    """VOC 2007: mean over the recalls 0, 0.1, ... 1 of the best precision at that recall or a higher one."""
    # point / 10 is what 3 of 10 objects give; 3 * 0.1 would be a little more.
    return float(np.mean([max(precision[recall >= point / 10], default=0.0) for point in range(11)]))


def area_ap(recall, precision):
    """VOC 2010: area under the curve, in which each precision is the best at that recall or a higher one."""
    best = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(recall, prepend=0) * best))
