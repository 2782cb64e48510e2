"""The optimizer, one epoch of training, and evaluation."""

import contextlib
import io
import math
import time
from collections import Counter
from operator import itemgetter

import numpy as np
import torch
from pycocotools.cocoeval import COCOeval
from torch import nn
from tqdm import tqdm

from src import distributed
from src.annotations import as_coco
from src.boxes import NMS_THRESHOLD, SCORE_THRESHOLD
from src.classes import to_category_ids
from src.transform import normalize
from src.usage import UserError
from src.voc_metric import VOC_METRICS, has_difficult, voc_metrics

LOG_EVERY = 10  # steps; losses are read, which waits for the device, only this often
METRICS = "AP AP50 AP75 APs APm APl AR1 AR10 AR100 ARs ARm ARl".split()


def make_optimizer(network, momentum=0.9, weight_decay=5e-4, backbone_lr_factor=1.0):
    """SGD; no weight decay on biases and batch norm. `train_steps` sets the learning rate before every step."""
    backbone = "backbone.", "feature_extractor."  # what its parameters' names start with
    groups = [
        {
            "params": [
                p
                for name, p in network.named_parameters()
                if (p.ndim > 1) == decays  # biases and batch norm have one dimension
                and name.startswith(backbone) == in_backbone
            ],
            "weight_decay": weight_decay if decays else 0.0,
            "lr_factor": backbone_lr_factor if in_backbone else 1.0,  # multiplies the learning rate of every step
        }
        for decays in (True, False)
        for in_backbone in (True, False)
    ]
    optimizer = torch.optim.SGD(groups, lr=0.0, momentum=momentum, fused=True)
    # Fused SGD leaves its buffers uninitialized if GradScaler skips the very first step.
    for p in network.parameters():
        optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return optimizer


def train_steps(run, loader, *, network, criterion, schedule, amp=False):
    """Train on what is left of an epoch, one step for each turn of the caller's loop (a generator).

    run has optimizer (from `make_optimizer`), scaler, epoch and samples_seen, which each step advances; loader
    yields images (B, 300, 300, 3) uint8, loc_targets (B, D, 4), cls_targets (B, D) and image ids (B,); network is
    run.network, inside DDP if several processes train; schedule(epoch, iteration) -> learning rate.
    Yields (iteration, report): after every LOG_EVERY steps report is {tag: number}, losses averaged
    since the last one; otherwise None. Raises UserError on a loss that is not finite.
    """
    network.train()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d) and not module.weight.requires_grad:
            module.eval()  # frozen
    device = next(network.parameters()).device
    recent = []  # (losses, image ids) of each step since the last report
    waited = 0.0  # seconds since then in which there was no batch to work on
    clock = ready = time.perf_counter()
    bar = tqdm(loader, f"epoch {run.epoch + 1}", disable=not distributed.is_main_process(), leave=False)
    for number, (images, loc_targets, cls_targets, ids) in enumerate(bar, start=1):
        waited += time.perf_counter() - ready
        per_step = len(ids) * distributed.world_size()
        iteration = run.samples_seen // per_step
        lr = schedule(run.epoch, iteration)
        for group in run.optimizer.param_groups:
            group["lr"] = lr * group["lr_factor"]
        images = normalize(images.to(device, non_blocking=True))
        loc_targets = loc_targets.to(device, non_blocking=True)
        cls_targets = cls_targets.to(device, non_blocking=True)
        with torch.autocast(device.type, enabled=amp):  # float16 on a GPU, bfloat16 on a CPU
            loc, cls_logits = network(images)
        loc_loss, cls_loss = criterion(loc, cls_logits, loc_targets, cls_targets)  # in float32
        run.optimizer.zero_grad()
        run.scaler.scale(loc_loss + cls_loss).backward()
        run.scaler.step(run.optimizer)
        run.scaler.update()
        run.samples_seen += per_step

        report = None
        recent.append((torch.stack([loc_loss, cls_loss]).detach(), ids))
        if (iteration + 1) % LOG_EVERY == 0 or number == len(loader):
            distributed.barrier()
            losses = torch.stack([losses for losses, _ in recent]).tolist()  # waits for the device
            means = mean_losses(losses)  # of all processes, so that all stop at what is not finite
            if not math.isfinite(means["Loss"]):
                raise non_finite_error(losses, [ids for _, ids in recent], run.epoch, iteration)
            seconds = time.perf_counter() - clock
            report = means | {"LR": lr, "Images_per_second": len(losses) * per_step / seconds}
            text = "loss {Loss:.3f}, lr {LR:.2e}, {Images_per_second:.1f} images/s"
            data = f", data {waited / len(losses):.3f} of {seconds / len(losses):.3f} s/step"
            bar.set_postfix_str(text.format(**report) + data)
            recent = []
            waited = 0.0
            clock = time.perf_counter()
        yield iteration, report
        ready = time.perf_counter()


def mean_losses(losses):
    """Mean over steps and processes of this process's losses, [[loc, cls], ...]."""
    sums = distributed.all_reduce([sum(column) for column in zip(*losses, strict=True)])
    loc, cls = (value / len(losses) / distributed.world_size() for value in sums)
    return {"Loss": loc + cls, "Loss_loc": loc, "Loss_cls": cls}


def non_finite_error(losses, image_ids, epoch, iteration):
    """The UserError for the first of this process's losses, [[loc, cls], ...], not finite."""
    first = iteration - len(losses) + 1
    for step, (values, ids) in enumerate(zip(losses, image_ids, strict=True), start=first):
        if not all(map(math.isfinite, values)):
            return UserError(
                f"loss {values} in epoch {epoch + 1}, iteration {step}, images {ids.tolist()}:"
                " lower --lr, or look at these images' boxes; the last checkpoint is kept"
            )
    return UserError(f"loss of another process not finite in epoch {epoch + 1}: see its message")


def evaluate(detector, loader, ground_truth, nms_threshold=NMS_THRESHOLD):
    """Detect in the images of `loader` and measure; each process takes its share of the images.

    loader yields images (B, 300, 300, 3) uint8, image ids (B,) and sizes (B, 2) in pixels; ground_truth
    is pycocotools' COCO. Returns, in every process, the metrics, as `compute_metrics` does, and the
    detections of all images, {image id: {boxes (K, 4) xyxy in pixels, labels (K,), scores (K,)}}.
    SSD section 3.7: scores above 0.01, NMS, the best 200 per image.
    """
    share = {}
    for images, image_ids, sizes in tqdm(loader, "evaluate", disable=not distributed.is_main_process(), leave=False):
        found = detector.detect_resized(images, sizes, SCORE_THRESHOLD, nms_threshold)
        share.update(zip(image_ids.tolist(), found, strict=True))
    detections = {}
    for part in distributed.all_gather(share):
        detections.update(part)
    return compute_metrics(ground_truth, detections, detector.category_ids), detections


def compute_metrics(ground_truth, detections, category_ids):
    """COCO's metrics of {image id: detections}: the twelve, and by class; collective.

    By name of the class, "per_class" is AP, "per_class_AP50" AP50, and "best_F1" {score, precision, recall} where
    F1 at an IoU of 0.5 is highest. Also "VOC07" and "VOC10" if `ground_truth` says which objects are difficult.
    """
    coco_eval = run_coco_eval(ground_truth, detections, category_ids)
    precision, scores = coco_eval.eval["precision"], coco_eval.eval["scores"]  # IoU, recall, class, area, detections
    recall = coco_eval.params.recThrs  # (R,)
    metrics = dict(zip(METRICS, coco_eval.stats.tolist(), strict=True))
    metrics |= {"per_class": {}, "per_class_AP50": {}, "best_F1": {}}
    for k, category in enumerate(ground_truth.loadCats(coco_eval.params.catIds)):
        name = category["name"]
        values = precision[:, :, k, 0, -1]
        if (values > -1).any():  # a class without an object has no AP
            metrics["per_class"][name] = float(values[values > -1].mean())
            metrics["per_class_AP50"][name] = float(values[0].mean())
            best = (values[0] * recall / (values[0] + recall).clip(min=1e-9)).argmax()  # half of F1
            point = {"score": scores[0, best, k, 0, -1], "precision": values[0, best], "recall": recall[best]}
            metrics["best_F1"][name] = {key: float(value) for key, value in point.items()}
    if has_difficult(ground_truth):
        metrics |= voc_metrics(ground_truth, coco_results(detections, category_ids))
    return metrics


def run_coco_eval(ground_truth, detections, category_ids):
    """Run pycocotools on the same {image id: detections} in every process; return its COCOeval, summarized.

    Nothing in pycocotools passes from one category to another until the last mean: each process
    evaluates its share of the categories; the joined result equals that of a single process bit for bit.
    """
    counts = Counter()
    for found in detections.values():
        counts.update(to_category_ids(found["labels"], category_ids).tolist())
    share = split_categories(ground_truth.cats, counts, distributed.world_size())[distributed.rank()]
    coco_eval = evaluate_categories(ground_truth, coco_results(detections, category_ids, share), share)
    arrays = {"precision": 2, "recall": 1, "scores": 2}  # the axis of categories
    by_category = [np.moveaxis(coco_eval.eval[name], axis, 0) for name, axis in arrays.items()]
    shares = distributed.all_gather(list(zip(coco_eval.params.catIds, *by_category, strict=True)))
    categories, *joined = zip(*sorted(sum(shares, []), key=itemgetter(0)), strict=True)
    coco_eval.params.catIds = list(categories)
    for (name, axis), values in zip(arrays.items(), joined, strict=True):
        coco_eval.eval[name] = np.stack(values, axis)
    with contextlib.redirect_stdout(io.StringIO()):
        coco_eval.summarize()
    return coco_eval


def coco_results(detections, category_ids, chosen=None):
    """{image id: detections} as a list of dicts in COCO's results format, by image id; of `chosen` categories only."""
    chosen = set(category_ids if chosen is None else chosen)
    results = []
    for image_id, found in sorted(detections.items()):
        corners = found["boxes"].double()
        boxes = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], dim=1)  # xyxy -> COCO's xywh
        columns = boxes.tolist(), found["scores"].tolist(), to_category_ids(found["labels"], category_ids).tolist()
        for box, score, category in zip(*columns, strict=True):
            if category in chosen:
                results.append({"image_id": image_id, "category_id": category, "bbox": box, "score": score})
    return results


def split_categories(categories, counts, shares):
    """Categories as `shares` lists that pycocotools evaluates in about the same time; counts: of detections.

    It takes detections one by one: the categories with most come first, each to the smallest share.
    """
    lists = [[] for _ in range(shares)]
    for category in sorted(categories, key=lambda category: (-counts[category], category)):
        min(lists, key=lambda share: sum(1 + counts[other] for other in share)).append(category)
    return lists


def evaluate_categories(ground_truth, results, categories):
    """pycocotools' COCOeval of some categories and their results only, accumulated."""
    # Not ground_truth.loadRes(results), which raises on an empty list.
    annotations = [
        result | {"id": number, "area": result["bbox"][2] * result["bbox"][3], "iscrowd": 0}
        for number, result in enumerate(results, start=1)
    ]
    found = as_coco(ground_truth.dataset | {"annotations": annotations})
    with contextlib.redirect_stdout(io.StringIO()):
        coco_eval = COCOeval(ground_truth, found, "bbox")
        coco_eval.params.catIds = categories
        coco_eval.evaluate()
        coco_eval.accumulate()
    return coco_eval


def metrics_table(metrics):
    """The twelve metrics, and VOC's where it was measured, as lines to print; one line if they are all -1."""
    if metrics["AP"] < 0:
        return "nothing to measure: the set has no boxes to find"
    rows = [METRICS[:3], METRICS[3:6], METRICS[6:9], METRICS[9:]]
    lines = ["  ".join(f"{name:>5} {metrics[name]:.3f}" for name in row) for row in rows]
    voc = [f"{name} mAP {metrics[name]['mAP']:.3f}" for name in VOC_METRICS if name in metrics]
    if voc:
        lines.append("  ".join(voc))
    return "\n".join(lines)


def class_table(metrics):
    """AP and AP50 of each class, VOC's AP where it was measured, and the best F1's score, as lines to print."""
    columns = {"AP": metrics["per_class"], "AP50": metrics["per_class_AP50"]}
    columns |= {name: metrics[name]["per_class"] for name in VOC_METRICS if name in metrics}
    for column in ("score", "precision", "recall"):
        columns[column] = {name: best[column] for name, best in metrics["best_F1"].items()}
    width = max(map(len, metrics["per_class"]), default=0)
    lines = [" " * width + "".join(f"{name:>10}" for name in columns)]
    for name in metrics["per_class"]:
        lines.append(f"{name:<{width}}" + "".join(f"{column[name]:10.3f}" for column in columns.values()))
    return "\n".join([*lines, "score, precision, recall: where F1 is highest, at an IoU of 0.5"])
