"""src.voc_metric against cases worked out by hand, and against an independent implementation."""

import json

import numpy as np
import pytest
from mean_average_precision import MetricBuilder
from samples import small_dataset

from src.annotations import as_coco
from src.engine import class_table, metrics_table
from src.voc_metric import area_ap, eleven_point_ap, has_difficult, right_or_wrong, voc_metrics


def ground_truth(*objects, names=("cat", "dog")):
    """pycocotools' COCO of objects (image id, category id, bbox, difficult)."""
    keys = ("image_id", "category_id", "bbox", "difficult")
    annotations = [dict(zip(keys, one, strict=True)) | {"id": n} for n, one in enumerate(objects, start=1)]
    annotations = [a | {"iscrowd": a["difficult"]} for a in annotations]
    categories = [{"id": n, "name": name} for n, name in enumerate(names, start=1)]
    images = [{"id": image} for image in sorted({one[0] for one in objects})]
    return as_coco({"images": images, "categories": categories, "annotations": annotations})


def row(image_id, bbox, score, category=1):
    return [image_id, *bbox, score, category]


def results(rows):
    """Rows of `row` in COCO's results format."""
    rows = np.array(rows, float).reshape(-1, 7).tolist()
    return [{"image_id": int(i), "category_id": int(c), "bbox": box, "score": s} for i, *box, s, c in rows]


def right(objects, *detections):
    """What `right_or_wrong` says of detections of class 1."""
    return right_or_wrong(results(detections), ground_truth(*objects).dataset["annotations"]).tolist()


BOX, SAME_BY_HALF = [10, 10, 40, 40], [10, 10, 40, 80]  # IoU exactly 0.5


def test_right_from_an_iou_of_one_half():
    assert right([(1, 1, BOX, 0)], row(1, SAME_BY_HALF, 0.9)) == [True]
    assert right([(1, 1, BOX, 0)], row(1, [10, 10, 40, 80.1], 0.9)) == [False]


def test_an_object_is_found_once_and_by_the_best_score():
    assert right([(1, 1, BOX, 0)], row(1, BOX, 0.3), row(1, SAME_BY_HALF, 0.9)) == [True, False]
    # The first of equal scores, as the kit's stable sort has it.
    assert right([(1, 1, BOX, 0)], row(1, BOX, 0.5), *[row(1, [50, 50, 9, 9], 0.5)] * 40) == [True] + [False] * 40


def test_only_the_object_overlapped_most_counts():
    """COCO would give the second detection the other object, which it overlaps by more than half, too."""
    objects = [(1, 1, [0, 0, 100, 100], 0), (1, 1, [0, 20, 100, 100], 0)]
    detections = [row(1, [0, 0, 100, 100], 0.9), row(1, [0, 5, 100, 100], 0.8)]
    assert right(objects, *detections) == [True, False]


def test_difficult_objects_make_detections_neither_right_nor_wrong():
    objects = [(1, 1, BOX, 1), (2, 1, BOX, 0)]
    assert right(objects, row(1, BOX, 0.9), row(1, BOX, 0.8), row(2, BOX, 0.7)) == [True]
    assert right(objects, row(1, [0, 0, 5, 5], 0.9)) == [False]  # beside it: wrong


def test_another_image_s_object_is_not_found():
    assert right([(1, 1, BOX, 0)], row(2, BOX, 0.9)) == [False]
    assert right([(1, 1, BOX, 0)]) == []


def test_an_edge_of_one_pixel_as_the_kit_counts_it():
    """In the kit's pixels, 1 to 2 is two wide and 2 to 3, too; they share one of three: 1/3, not 0."""
    objects = [(1, 1, [0, 0, 2, 1], 0)]  # xmin 1, xmax 2, as tools/voc.py writes it
    assert right(objects, row(1, [0, 0, 1, 1], 0.9)) == [True]  # one pixel of two: 1/2
    assert right(objects, row(1, [1, 0, 2, 1], 0.9)) == [False]


def test_average_precision_worked_out_by_hand():
    # Right, wrong, right, of four objects: recall 1/4, 1/4, 1/2; precision 1, 1/2, 2/3.
    recall, precision = np.array([0.25, 0.25, 0.5]), np.array([1, 0.5, 2 / 3])
    # Recall 0, .1, .2: 1. Recall .3, .4, .5: 2/3. From .6 on: 0.
    assert eleven_point_ap(recall, precision) == pytest.approx((3 + 3 * 2 / 3) / 11)
    assert area_ap(recall, precision) == pytest.approx(0.25 * 1 + 0.25 * 2 / 3)
    nothing = np.zeros(0)
    assert eleven_point_ap(nothing, nothing) == area_ap(nothing, nothing) == 0


@pytest.mark.parametrize("tenths", range(11))
def test_each_recall_of_the_eleven_is_reached_exactly(tenths):
    """3 of 10 reach recall 0.3, which 3 * 0.1 in floating point exceeds."""
    recall = np.arange(1, tenths + 1) / 10
    assert eleven_point_ap(recall, np.ones(tenths)) == pytest.approx((tenths + 1 if tenths else 0) / 11)


def test_classes_and_their_mean():
    objects = [(1, 1, BOX, 0), (1, 2, BOX, 0), (2, 2, BOX, 0), (2, 3, BOX, 1)]
    found = results([row(1, BOX, 0.9, 1), row(1, BOX, 0.8, 2), row(2, BOX, 0.8, 3)])
    metrics = voc_metrics(ground_truth(*objects, names=("cat", "dog", "only difficult", "absent")), found)
    assert metrics["VOC07"]["per_class"] == pytest.approx({"cat": 1, "dog": 6 / 11})
    assert metrics["VOC10"]["per_class"] == pytest.approx({"cat": 1, "dog": 1 / 2})
    assert metrics["VOC07"]["mAP"] == pytest.approx((1 + 6 / 11) / 2)
    assert metrics["VOC10"]["mAP"] == pytest.approx(3 / 4)
    json.dumps(metrics)  # plain numbers


def test_nothing_to_find_and_nothing_found():
    nothing = []
    assert voc_metrics(ground_truth((1, 1, BOX, 1)), nothing)["VOC07"] == {"mAP": -1, "per_class": {}}
    assert voc_metrics(ground_truth((1, 1, BOX, 0)), nothing)["VOC10"] == {"mAP": 0, "per_class": {"cat": 0}}


def random_case(seed, difficult, images=20):
    """Objects and detections near them, doubled, and anywhere; `difficult` ones only alone in their image and class."""
    rng = np.random.default_rng(seed)
    objects, found = [], []
    for image in range(images):
        for category in (1, 2, 3):
            for _ in range(rng.integers(0, 2 if difficult else 4)):
                box = [*rng.uniform(0, 60, 2), *rng.uniform(15, 50, 2)]
                objects.append((image, category, box, int(difficult and rng.random() < 0.4)))
                for _ in range(rng.integers(0, 3)):
                    found.append(row(image, np.array(box) + rng.normal(0, 4, 4), 0, category))
        for _ in range(rng.integers(0, 4)):
            found.append(row(image, [*rng.uniform(0, 60, 2), *rng.uniform(15, 50, 2)], 0, rng.integers(1, 4)))
    found = np.array(found)
    found[:, 5] = rng.permutation(np.linspace(0.02, 0.99, len(found)))
    return objects, found


@pytest.mark.parametrize("difficult", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_equals_an_independent_implementation(seed, difficult):
    """mean_average_precision mixes up `difficult` where an image has several objects of a class, so none has."""
    objects, found = random_case(seed, difficult)
    metrics = voc_metrics(ground_truth(*objects, names=("a", "b", "c")), results(found))
    assert 0.05 < metrics["VOC07"]["mAP"] < 0.95
    peer = MetricBuilder.build_evaluation_metric("map_2d", num_classes=3)
    for image in sorted({int(i) for i in found[:, 0]} | {one[0] for one in objects}):
        # It counts the last pixel, as the kit does, so corners are those of the XML.
        corners = lambda box: [box[0] + 1, box[1] + 1, box[0] + box[2], box[1] + box[3]]  # noqa: E731
        preds = [[*corners(r[1:5]), r[6] - 1, r[5]] for r in found[found[:, 0] == image]]
        here = [[*corners(box), category - 1, hard, 0] for i, category, box, hard in objects if i == image]
        peer.add(np.array(preds, float).reshape(-1, 6), np.array(here, float).reshape(-1, 7))
    theirs, eleven = peer.value(0.5)[0.5], peer.value(0.5, np.arange(11) / 10)[0.5]
    for c, label in enumerate("abc"):
        # Its recall counts the difficult ones among those to be found.
        every, easy = (sum(one[1] == c + 1 and one[3] <= hard for one in objects) for hard in (1, 0))
        recall, precision = (theirs[c]["recall"] * every).round() / easy, theirs[c]["precision"]
        assert metrics["VOC07"]["per_class"][label] == pytest.approx(eleven_point_ap(recall, precision), abs=1e-6)
        assert metrics["VOC10"]["per_class"][label] == pytest.approx(area_ap(recall, precision), abs=1e-6)
        if not difficult:
            assert metrics["VOC10"]["per_class"][label] == pytest.approx(theirs[c]["ap"], abs=1e-6)
            assert metrics["VOC07"]["per_class"][label] == pytest.approx(eleven[c]["ap"], abs=1e-6)


def test_only_sets_with_difficult_have_the_metric(tmp_path):
    assert has_difficult(ground_truth((1, 1, BOX, 0)))
    assert not has_difficult(as_coco(json.loads(small_dataset(tmp_path).read_text())))


def test_printed_by_class():
    metrics = {name: 0.5 for name in "AP AP50 AP75 APs APm APl AR1 AR10 AR100 ARs ARm ARl".split()}
    metrics["per_class"] = metrics["per_class_AP50"] = {"cat": 0.25, "aeroplane": 0.5}
    metrics["best_F1"] = dict.fromkeys(metrics["per_class"], {"score": 0.1, "precision": 0.2, "recall": 0.3})
    metrics["VOC07"] = {"mAP": 0.625, "per_class": {"cat": 0.625, "aeroplane": 0.75}}
    metrics["VOC10"] = {"mAP": 0.75, "per_class": {"cat": 0.75, "aeroplane": 0.875}}
    assert metrics_table(metrics).splitlines()[-1] == "VOC07 mAP 0.625  VOC10 mAP 0.750"
    header, cat, aeroplane, _ = class_table(metrics).splitlines()
    assert header.split()[:4] == ["AP", "AP50", "VOC07", "VOC10"]
    assert cat.split()[:5] == ["cat", "0.250", "0.250", "0.625", "0.750"]
    assert aeroplane.split()[:5] == ["aeroplane", "0.500", "0.500", "0.750", "0.875"]
