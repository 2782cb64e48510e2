"""src.engine: evaluation against pycocotools, training steps against hand-worked values."""

import contextlib
import copy
import io
import json
import re
import time
from collections import Counter

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from runs import same
from samples import as_detections
from torch import nn
from torch.utils.data import DataLoader

from src.annotations import load_ground_truth
from src.boxes import Encoder, make_default_boxes
from src.checkpoint import Run
from src.dataset import CocoDataset
from src.engine import (
    LOG_EVERY,
    METRICS,
    class_table,
    coco_results,
    compute_metrics,
    evaluate,
    make_optimizer,
    metrics_table,
    split_categories,
    train_steps,
)
from src.loss import MultiBoxLoss
from src.model import build_model, freeze
from src.usage import UserError


def val_file(folder):
    return folder / "annotations" / "instances_val2017.json"


@pytest.fixture(scope="module")
def ground_truth(shapes_folder):
    """Ground truth with a crowd and a image without objects."""
    coco = load_ground_truth(val_file(shapes_folder))
    assert any(a["iscrowd"] for a in coco.anns.values())
    assert any(not coco.getAnnIds([image]) for image in coco.imgs)
    return coco


def pycocotools_metrics(ground_truth, detections, categories=None):
    """The twelve metrics as pycocotools' own loadRes and COCOeval give them: the oracle."""
    results = coco_results(detections, sorted(ground_truth.cats))
    with contextlib.redirect_stdout(io.StringIO()):
        coco_eval = COCOeval(ground_truth, ground_truth.loadRes(results), "bbox")
        if categories:
            coco_eval.params.catIds = categories
        coco_eval.evaluate()
        coco_eval.accumulate()
        coco_eval.summarize()
    return coco_eval.stats


def perturbed(ground_truth, seed):
    """Detections by image: objects moved, lost, doubled, of a wrong class, invented."""
    rng = np.random.default_rng(seed)
    rows = []
    categories = list(ground_truth.cats)
    for a in ground_truth.anns.values():
        for _ in range(rng.integers(0, 3)):
            x, y, w, h = np.array(a["bbox"]) + rng.normal(0, 0.08, 4) * a["bbox"][2]
            category = a["category_id"] if rng.random() < 0.8 else rng.choice(categories)
            rows.append([a["image_id"], x, y, max(w, 1), max(h, 1), 0, category])
    for image in ground_truth.imgs:
        for _ in range(rng.integers(0, 4)):
            rows.append([image, *rng.uniform(5, 150, 4), 0, rng.choice(categories)])
    rows = np.array(rows)
    rows[:, 5] = rng.permutation(np.linspace(0.02, 0.99, len(rows)))
    return as_detections(rows, sorted(ground_truth.cats))


def metrics_of(ground_truth, detections):
    return compute_metrics(ground_truth, detections, sorted(ground_truth.cats))


# compute_metrics


def test_no_detections_score_zero(ground_truth):
    metrics = metrics_of(ground_truth, {})  # pycocotools' loadRes([]) raises IndexError
    areas = {"s": (0, 32**2), "m": (32**2, 96**2), "l": (96**2, 1e10)}
    for name in METRICS:
        low, high = areas.get(name[-1], (0, 1e10))
        objects = [a for a in ground_truth.anns.values() if not a["iscrowd"]]
        exist = any(low <= a["area"] < high for a in objects)
        assert metrics[name] == (0 if exist else -1), name  # COCO's -1: nothing to find
    assert metrics["per_class"] and not any(metrics["per_class"].values())


@pytest.mark.parametrize("seed", range(3))
def test_metrics_are_pycocotools_own(ground_truth, seed):
    detections = perturbed(ground_truth, seed)
    metrics = metrics_of(ground_truth, detections)
    assert list(metrics) == [*METRICS, "per_class", "per_class_AP50", "best_F1"]
    assert np.mean(list(metrics["per_class_AP50"].values())) == pytest.approx(metrics["AP50"])
    assert 0.05 < metrics["AP"] < 0.9  # neither extreme would tell much
    assert [metrics[name] for name in METRICS] == pycocotools_metrics(ground_truth, detections).tolist()


def test_per_class_ap_is_that_of_each_class_alone(ground_truth):
    detections = perturbed(ground_truth, 7)
    per_class = metrics_of(ground_truth, detections)["per_class"]
    for category, entry in ground_truth.cats.items():
        alone = pycocotools_metrics(ground_truth, detections, [category])[0]
        if alone > -1:
            assert per_class.pop(entry["name"]) == pytest.approx(alone, abs=1e-12)
    assert not per_class  # a class without an object has no AP
    json.dumps(metrics_of(ground_truth, detections))  # plain numbers


@pytest.mark.parametrize("seed", range(3))
def test_the_score_of_the_best_f1_has_its_precision_and_recall(ground_truth, seed):
    """Counted by hand at every score: which detections are right, in COCO's manner, is the oracle's own."""
    detections = perturbed(ground_truth, seed)
    metrics = metrics_of(ground_truth, detections)
    results = coco_results(detections, sorted(ground_truth.cats))
    with contextlib.redirect_stdout(io.StringIO()):
        coco_eval = COCOeval(ground_truth, ground_truth.loadRes(results), "bbox")
        coco_eval.params.iouThrs = np.array([0.5])
        coco_eval.evaluate()
    for category, entry in ground_truth.cats.items():
        matches = []
        objects = 0
        for image in filter(None, coco_eval.evalImgs):
            if image["category_id"] == category and image["aRng"] == coco_eval.params.areaRng[0]:
                kept = ~image["dtIgnore"][0].astype(bool)
                matches += zip(np.array(image["dtScores"])[kept], image["dtMatches"][0][kept] > 0, strict=True)
                objects += int((~np.array(image["gtIgnore"], bool)).sum())
        if not objects:
            assert entry["name"] not in metrics["best_F1"]
            continue
        found = metrics["best_F1"][entry["name"]]
        points = {}  # by score: precision, recall, F1
        for score, _ in matches:
            above = [match for other, match in matches if other >= score]
            points[score] = sum(above) / len(above), sum(above) / objects, 2 * sum(above) / (len(above) + objects)
        if not any(match for _, match in matches):
            assert found["precision"] == found["recall"] == 0
            continue
        precision, recall, f1 = points[found["score"]]
        assert f1 == pytest.approx(max(f1 for _, _, f1 in points.values()))
        assert found["precision"] == pytest.approx(precision)
        assert recall - 0.01 < found["recall"] <= recall + 1e-9  # COCO's recalls are in steps of 0.01


def test_the_table_of_classes_shows_where_f1_is_best():
    point = {"score": 0.31, "precision": 0.62, "recall": 0.53}
    table = class_table({"per_class": {"a cat": 0.11}, "per_class_AP50": {"a cat": 0.22}, "best_F1": {"a cat": point}})
    names, values, note = table.splitlines()
    assert names.split() == ["AP", "AP50", "score", "precision", "recall"]
    assert values.split() == ["a", "cat", "0.110", "0.220", "0.310", "0.620", "0.530"] and "F1" in note


def test_metrics_do_not_change_what_they_are_given(ground_truth):
    detections = perturbed(ground_truth, 1)
    copies = copy.deepcopy(detections), json.dumps(ground_truth.dataset)
    first, second = metrics_of(ground_truth, detections), metrics_of(ground_truth, detections)
    assert first == second and copies[1] == json.dumps(ground_truth.dataset)
    assert same(detections, copies[0])


def test_categories_are_split_by_their_detections():
    counts = {1: 0, 2: 500, 3: 1, 4: 90, 5: 100, 6: 0, 7: 10}
    for shares in range(1, 10):  # also more than there are categories
        lists = split_categories(counts, counts, shares)
        assert len(lists) == shares and sorted(sum(lists, [])) == sorted(counts)
    assert split_categories(counts, counts, 3) == [[2], [5, 3, 6], [4, 7, 1]]
    assert [len(share) for share in split_categories(counts, Counter(), 3)] == [3, 2, 2]  # nothing was found


def test_results_are_in_cocos_format():
    rows = np.array([[141, 0, 0, 5, 5, 0.5, 3], [139, 1.5, 2, 30, 40, 0.75, 21]])
    first = {"image_id": 139, "category_id": 21, "bbox": [1.5, 2, 30, 40], "score": 0.75}
    results = coco_results(as_detections(rows, [3, 21]), [3, 21])
    assert results[0] == first and [result["image_id"] for result in results] == [139, 141]
    assert type(results[1]["image_id"]) is type(results[1]["category_id"]) is int
    assert coco_results({}, [3, 21]) == []


def test_the_table_shows_all_twelve_metrics():
    table = metrics_table({name: i / 100 for i, name in enumerate(METRICS)})
    words = table.split()
    assert words[0::2] == METRICS
    assert [float(word) for word in words[1::2]] == [i / 100 for i in range(12)]


# evaluate


class Oracle:
    """A detector that knows: it gives back the annotations, in the order of the data set."""

    def __init__(self, file, found=True):
        content = json.loads(file.read_text())
        self.category_ids = sorted(category["id"] for category in content["categories"])
        self.answers = []
        self.thresholds = set()
        self.found = found
        for image in sorted(content["images"], key=lambda image: image["id"]):
            own = [a for a in content["annotations"] if a["image_id"] == image["id"]]
            own = [a for a in own if not a["iscrowd"]]
            size = image["width"], image["height"]
            self.answers.append((size, [(a["bbox"], a["category_id"]) for a in own]))

    def detect_resized(self, images, sizes, score_threshold, nms_threshold):
        assert images.shape[1:] == (300, 300, 3) and images.dtype == torch.uint8
        self.thresholds.add((score_threshold, nms_threshold))
        out = []
        for size in sizes:
            expected, objects = self.answers.pop(0)
            assert tuple(size.tolist()) == expected
            boxes = torch.tensor([b for b, _ in objects if self.found]).reshape(-1, 4)
            boxes[:, 2:] += boxes[:, :2]
            labels = [1 + self.category_ids.index(c) for _, c in objects if self.found]
            scores = torch.linspace(1, 0.5, len(labels))
            out.append({"boxes": boxes, "labels": torch.tensor(labels).long(), "scores": scores})
        return out


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_detector_that_finds_everything_scores_one(shapes_folder, ground_truth, batch_size):
    loader = DataLoader(CocoDataset(shapes_folder, "val2017"), batch_size)
    oracle = Oracle(val_file(shapes_folder))
    metrics, detections = evaluate(oracle, loader, ground_truth, nms_threshold=0.4)
    assert not oracle.answers  # every image was shown, those without an object too
    assert oracle.thresholds == {(0.01, 0.4)}  # SSD section 3.7
    assert metrics["AP"] == pytest.approx(1)
    objects = [a for a in ground_truth.anns.values() if not a["iscrowd"]]
    assert sorted(detections) == sorted(ground_truth.imgs)
    results = coco_results(detections, sorted(ground_truth.cats))
    expected = sorted((a["image_id"], *a["bbox"], a["category_id"]) for a in objects)
    rows = sorted((r["image_id"], *r["bbox"], r["category_id"]) for r in results)
    np.testing.assert_allclose(rows, expected, atol=1e-3)
    assert all(0.5 <= r["score"] <= 1 for r in results)


def test_a_detector_that_finds_nothing_scores_zero(shapes_folder, ground_truth):
    loader = DataLoader(CocoDataset(shapes_folder, "val2017"), 4)
    oracle = Oracle(val_file(shapes_folder), found=False)
    metrics, detections = evaluate(oracle, loader, ground_truth)
    assert metrics["AP"] == 0 and not any(len(found["boxes"]) for found in detections.values())


def test_large_image_ids_survive(tmp_path):
    # COCO's ids fit a float32 no more: 2^24 is 16.8 million.
    image_id = 2**40 + 1
    images = [{"id": image_id, "width": 300, "height": 300}]
    entry = {"id": 1, "image_id": image_id, "category_id": 5, "bbox": [9, 9, 99, 99]}
    ground_truth = COCO()
    ground_truth.dataset = {"images": images, "categories": [{"id": 5, "name": "x"}]}
    ground_truth.dataset["annotations"] = [entry | {"area": 9801, "iscrowd": 0}]
    ground_truth.createIndex()

    class One:
        category_ids = [5]

        def detect_resized(self, images, sizes, *thresholds):
            boxes = torch.tensor([[9.0, 9, 108, 108]])
            return [{"boxes": boxes, "labels": torch.tensor([1]), "scores": torch.tensor([0.9])}]

    pixels = torch.zeros(1, 300, 300, 3, dtype=torch.uint8)
    loader = [(pixels, torch.tensor([image_id]), torch.tensor([[300.0, 300]]))]
    metrics, detections = evaluate(One(), loader, ground_truth)
    assert metrics["AP"] == pytest.approx(1)
    assert coco_results(detections, [5])[0]["image_id"] == image_id


# train_steps


class Weight(nn.Module):
    """One weight, handed to the criterion as both outputs."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(()))

    def forward(self, images):
        assert images.dtype == torch.float32 and images.shape[1:] == (3, 300, 300)
        return self.w, self.w


def batches(count, size=2):
    """`count` batches; cls_targets hold the batch's number, ids count up."""
    pixels = torch.zeros(size, 300, 300, 3, dtype=torch.uint8)
    return [
        (pixels, torch.zeros(size, 1, 4), torch.full((size, 1), i), torch.arange(size) + 100 * i) for i in range(count)
    ]


def run_of(network, optimizer, epoch=0, samples_seen=0):
    """What train_steps needs of a Run."""
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return Run("ssdlite", network, optimizer, scaler, [], [], {}, epoch, samples_seen)


def plain_sgd(model, momentum=0):
    groups = [{"params": model.parameters(), "lr_factor": 1.0}]
    return torch.optim.SGD(groups, 123.0, momentum)  # a rate that must be overwritten


def train(model, loader, criterion, first=0, epoch=0, lr=lambda *_: 0.1, amp=False, momentum=0):
    """All that an epoch yields, trained with plain SGD; batches of two."""
    run = run_of(model, plain_sgd(model, momentum), epoch, 2 * first)
    return steps_of(run, loader, criterion, lr, amp)


def steps_of(run, loader, criterion, lr, amp=False):
    return train_steps(run, loader, network=run.network, criterion=criterion, schedule=lr, amp=amp)


def logged(steps):
    """The steps that have a report."""
    return [(iteration, report) for iteration, report in steps if report]


def constant_losses(loc, cls, loc_targets, cls_targets):
    """Losses i and 10 i in batch i, of gradient 1 and 10."""
    number = cls_targets.flatten()[0].float()
    return loc - loc.detach() + number, 10 * (cls - cls.detach() + number)


@pytest.mark.parametrize(
    "first, count, expected",
    [(0, 23, [9, 19, 22]), (0, 20, [9, 19]), (7, 5, [9, 11]), (9, 1, [9]), (0, 1, [0]), (4, 0, [])],
)
def test_it_yields_every_step_and_reports_every_ten_and_at_the_last(first, count, expected):
    assert LOG_EVERY == 10
    steps = list(train(Weight(), batches(count), constant_losses, first))
    assert [iteration for iteration, _ in steps] == list(range(first, first + count))
    assert [iteration for iteration, _ in logged(steps)] == expected
    start = first
    for iteration, report in logged(steps):  # the mean since the last time
        mean = np.mean([i - first for i in range(start, iteration + 1)])
        assert report["Loss_loc"] == pytest.approx(mean)
        assert report["Loss_cls"] == pytest.approx(10 * mean)
        assert report["Loss"] == pytest.approx(11 * mean)
        assert report["Images_per_second"] > 0
        start = iteration + 1


def test_a_groups_factor_multiplies_its_learning_rate():
    class TwoWeights(Weight):
        def __init__(self):
            super().__init__()
            self.v = nn.Parameter(torch.zeros(()))

        def forward(self, images):
            return self.w, self.v

    model = TwoWeights()
    groups = [{"params": [model.w], "lr_factor": 0.25}, {"params": [model.v], "lr_factor": 1.0}]
    run = run_of(model, torch.optim.SGD(groups, 123.0))
    rates = lambda epoch, iteration: 0.1 * (iteration + 1)  # noqa: E731
    steps = steps_of(run, batches(10), constant_losses, rates)  # gradients 1 and 10
    ((_, report),) = logged(steps)
    total = 0.1 * sum(range(1, 11))
    assert model.w.item() == pytest.approx(-0.25 * total)
    assert model.v.item() == pytest.approx(-10 * total)
    assert report["LR"] == pytest.approx(1.0)  # the last step's, without a factor


def test_frozen_layers_keep_their_weights_and_statistics():
    torch.manual_seed(0)
    network = build_model("ssdlite", 3, pretrained_backbone=False)
    freeze(network)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    targets = torch.zeros(2, 3000, 4), torch.ones(2, 3000, dtype=torch.int64)
    loader = [(torch.randint(0, 256, (2, 300, 300, 3), dtype=torch.uint8), *targets, torch.arange(2))]
    run = run_of(network, make_optimizer(network))
    list(steps_of(run, loader, MultiBoxLoss(), lambda *_: 0.01))
    after = network.state_dict()
    for key in before:
        frozen = key.startswith(("backbone.mean", *(f"backbone.to_stride_16.{n}." for n in range(7))))
        assert torch.equal(before[key], after[key]) == frozen, key


def test_the_progress_bar_says_how_long_a_step_waits_for_data(capfd):
    class Slow(list):
        def __iter__(self):
            for batch in super().__iter__():
                time.sleep(0.05)
                yield batch

    for _ in train(Weight(), Slow(batches(20)), constant_losses):
        time.sleep(0.02)  # saving, say: part of the step, but no waiting
    waits = re.findall(r"data ([0-9.]+) of ([0-9.]+) s/step", capfd.readouterr().err)
    assert len(waits) >= 2
    for data, step in waits:
        assert 0.05 <= float(data) < float(step) - 0.015  # 9 of 10 steps end within the window


def test_every_step_has_its_own_learning_rate_and_gradient():
    # dLoss/dw is 11 in every step: w goes down by 11 times the sum of the rates.
    def rate(epoch, iteration):
        assert epoch == 3
        return 0.001 * (iteration + 1)

    model = Weight()
    steps = logged(train(model, batches(6), constant_losses, first=8, epoch=3, lr=rate))
    assert model.w.item() == pytest.approx(-11 * 0.001 * sum(range(9, 15)), rel=1e-5)
    assert [report["LR"] for _, report in steps] == pytest.approx([0.010, 0.014])


def test_training_sets_training_mode_and_normalizes():
    seen = []

    class Spy(Weight):
        def forward(self, images):
            seen.append((self.training, images[0, :, 0, 0].tolist()))
            return super().forward(images)

    model = Spy().eval()
    list(train(model, batches(1), constant_losses))
    # Black is minus mean over standard deviation, ImageNet's.
    black = [-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225]
    assert seen == [(True, pytest.approx(black, abs=1e-4))]


def test_a_step_is_done_when_it_is_yielded():
    model = Weight()  # a checkpoint saved now has this step in it
    run = run_of(model, plain_sgd(model), samples_seen=8)
    steps = steps_of(run, batches(3), constant_losses, lambda *_: 0.1)
    for done, _ in enumerate(steps, start=1):
        assert model.w.item() == pytest.approx(-1.1 * done, rel=1e-5)
        assert run.samples_seen == 8 + 2 * done


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("which", ["loc", "cls"])
def test_a_loss_that_is_not_finite_stops_with_epoch_iteration_and_images(value, which):
    def criterion(loc, cls, loc_targets, cls_targets):
        factor = value if cls_targets.flatten()[0] >= 13 else 1
        loc_factor, cls_factor = (factor, 1) if which == "loc" else (1, factor)
        return loc * 0 + loc_factor, cls * 0 + cls_factor

    with pytest.raises(UserError) as error:
        list(train(Weight(), batches(40), criterion, first=20, epoch=4))
    message = str(error.value)
    assert "epoch 5" in message and "iteration 33" in message and "[1300, 1301]" in message
    assert "--lr" in message and "\n" not in message


def test_mixed_precision_computes_in_half_and_keeps_float_weights():
    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, images):
            return self.layer(images.mean(dim=(2, 3))).unbind(1)

    seen = []

    def criterion(loc, cls, loc_targets, cls_targets):
        seen.append(loc.dtype)
        return loc.float().mean(), cls.float().mean()

    model = Linear()
    for amp in (False, True):
        list(train(model, batches(1), criterion, amp=amp))
    assert seen == [torch.float32, torch.bfloat16]
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())


def test_ssdlite_learns_a_batch_of_two(shapes_folder):
    torch.manual_seed(0)
    encoder = Encoder(make_default_boxes("ssdlite"))
    data = CocoDataset(shapes_folder, "train2017", encoder)
    full = [i for i in range(len(data)) if len(data.objects(i)[0]) > 0][:2]
    batch = next(iter(DataLoader(data, 2, sampler=[(0, i) for i in full])))
    model = build_model("ssdlite", len(data.classes), pretrained_backbone=False)
    steps = train(model, [batch] * 21, MultiBoxLoss(), lr=lambda *_: 5e-3, momentum=0.9)
    losses = [report["Loss"] for _, report in logged(steps)]
    assert len(losses) == 3 and losses[2] < 0.7 * losses[0]
