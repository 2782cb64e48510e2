"""COCO metrics of a checkpoint on a data set in COCO layout, and images of what it finds.

python test_dataset.py --data-path /coco --pretrained-model trained_models/ssd.pth
"""

import json
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from tqdm import tqdm

from src import usage
from src.annotations import load_ground_truth
from src.boxes import SCORE_THRESHOLD
from src.dataset import CocoDataset, check_categories
from src.detector import DATASET_THRESHOLD, Detector, add_options, keep_above
from src.engine import class_table, coco_results, compute_metrics, metrics_table
from src.images import save_image
from src.usage import UserError
from src.visualize import draw_detections


def parse_args():
    parser = usage.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--data-path", default="/coco", help="folder with annotations/ and the images' folders")
    add("--val-set", default="val2017", help="folder of the images")
    add_options(parser, DATASET_THRESHOLD, "lowest score to draw; no effect on mAP")
    add("--batch-size", type=usage.number(int, 1), default=32, help="images in memory and per forward pass")
    add("--num-workers", type=usage.number(int, 0), default=4, help="threads that read and draw images")
    add("--output", default="predictions", help="folder for images, detections and metrics")
    return parser.parse_args()


def main():
    """Detect and draw, batch by batch; then measure and write the results."""
    args = parse_args()
    output = Path(args.output)
    detector = Detector.load(args.pretrained_model, args.device, args.amp)
    print(f"{args.pretrained_model}: {detector.origin}")
    dataset = CocoDataset(args.data_path, args.val_set)
    check_categories(dataset, detector.category_ids, detector.classes, args.pretrained_model)
    if output.resolve() == dataset.folder.resolve():
        raise UserError(f"--output {output}: is the images' own folder; give another")
    dataset.check_files("validation")
    print(dataset.describe("validation"))
    names = ["detections.json", "metrics.json", *(f"{image_id}.jpg" for image_id in dataset.image_ids)]
    inputs = [args.pretrained_model, dataset.annotation_file, *map(dataset.path, range(len(dataset)))]
    usage.prepare_outputs([("--output", output / name) for name in names], inputs)
    ground_truth = load_ground_truth(dataset.annotation_file)
    detections = {}
    errors = []  # of drawing; reported after the other images and the metrics
    draw = partial(draw_to, output, detector.classes, args.cls_threshold)
    with ThreadPoolExecutor(max(1, args.num_workers)) as pool:
        for first in tqdm(range(0, len(dataset), args.batch_size), "detect", leave=False):
            indices = range(first, min(first + args.batch_size, len(dataset)))
            images = list(pool.map(dataset.read, indices))
            found = detector(images, SCORE_THRESHOLD, args.nms_threshold)
            image_ids = dataset.image_ids[indices].tolist()
            detections.update(zip(image_ids, found, strict=True))
            errors += filter(None, pool.map(draw, image_ids, images, found))
            del images  # before the next ones are read
    metrics = compute_metrics(ground_truth, detections, detector.category_ids)
    print(metrics_table(metrics))
    if 0 < len(metrics["per_class"]) <= 30:  # more would not fit on a screen
        print(class_table(metrics))
    (output / "detections.json").write_text(json.dumps(coco_results(detections, detector.category_ids)))
    (output / "metrics.json").write_text(json.dumps(metrics, indent=1))
    print(f"{len(dataset) - len(errors)} images, detections.json, metrics.json -> {output}")
    if errors:
        raise UserError("; ".join(errors))


def draw_to(output, classes, threshold, image_id, image, found):
    """Draw what scores above `threshold` in an image to the folder `output`; returns an error message, or None."""
    file = output / f"{image_id}.jpg"
    try:
        save_image(draw_detections(image, **keep_above(threshold, found), classes=classes), file, quality=90)
    except UserError as error:
        return str(error)
    except OSError as error:  # a full disk
        return f"{file}: {error.strerror}; make room and start again"
    return None


if __name__ == "__main__":
    usage.run(main)
