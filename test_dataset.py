"""COCO metrics of a checkpoint on a data set in COCO layout, and images of what it finds.

python test_dataset.py --data-path /coco --pretrained-model trained_models/ssd.pth
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # which `python -P` leaves out

from src import usage

if __name__ == "__main__":
    usage.quit_on_ctrl_c()  # the imports below take seconds

import json

import numpy as np
from torch.utils.data import DataLoader
from tqdm import tqdm

from src.annotations import ground_truth
from src.dataset import CocoDataset, check_categories
from src.detector import Detector
from src.engine import class_table, coco_results, evaluate, metrics_table
from src.images import save_image
from src.usage import UserError
from src.visualize import draw_detections


def parse_args():
    """The command line."""
    parser = usage.ArgumentParser(description=__doc__)
    share = usage.number(float, 0, 1)
    add = parser.add_argument
    add("--data-path", default="/coco", help="folder with annotations/ and the images' folders")
    add("--val-set", default="val2017", help="folder of the images")
    add("--pretrained-model", required=True, help="checkpoint from train.py, or a published one")
    add("--cls-threshold", type=share, default=0.5, help="lowest score to draw; no effect on mAP")
    add("--nms-threshold", type=share, default=0.5, help="IoU above which a weaker box is removed")
    add("--batch-size", type=usage.number(int, 1), default=32, help="images per forward pass")
    add("--num-workers", type=usage.number(int, 0), default=4, help="loading processes")
    add("--amp", action="store_true", help="half precision: float16 on a GPU, bfloat16 on a CPU")
    add("--output", default="predictions", help="folder for images, detections and metrics")
    return parser.parse_args()


def main():
    """Evaluate, write the results, draw."""
    args = parse_args()
    output = Path(args.output)
    detector = Detector.load(args.pretrained_model, amp=args.amp)
    print(f"{args.pretrained_model}: {detector.layout}")
    dataset = CocoDataset(args.data_path, args.val_set, size=detector.size)
    check_categories(dataset, detector.category_ids, detector.classes, args.pretrained_model)
    if output.resolve() == dataset.folder.resolve():
        raise UserError(f"--output {output}: is the images' own folder; give another")
    dataset.check_files(tqdm(range(len(dataset)), "checking images", leave=False))
    print(dataset.describe("validation"))
    names = ["detections.json", "metrics.json", *(f"{image_id}.jpg" for image_id in dataset.image_ids)]
    inputs = [args.pretrained_model, dataset.annotation_file, *map(dataset.path, range(len(dataset)))]
    usage.prepare_outputs([("--output", output / name) for name in names], inputs)
    loader = DataLoader(dataset, args.batch_size, num_workers=args.num_workers)
    truth = ground_truth(dataset.annotation_file)
    metrics, detections = evaluate(detector, loader, truth, args.nms_threshold)
    results = coco_results(detections)
    (output / "detections.json").write_text(json.dumps(results))
    (output / "metrics.json").write_text(json.dumps(metrics, indent=1))
    print(metrics_table(metrics))
    if "VOC07" in metrics and metrics["per_class"]:
        print(class_table(metrics))
    failed = []
    for index, image_id in enumerate(tqdm(dataset.image_ids, "draw", leave=False)):
        rows = detections[detections[:, 0] == image_id]
        rows = rows[rows[:, 5] > args.cls_threshold]
        boxes = np.concatenate([rows[:, 1:3], rows[:, 1:3] + rows[:, 3:5]], axis=1)
        labels = np.searchsorted(detector.category_ids, rows[:, 6]) + 1
        try:
            drawn = draw_detections(dataset.read(index), boxes, labels, rows[:, 5], detector.classes)
            save_image(drawn, output / f"{image_id}.jpg", quality=90)
        except UserError as error:
            failed.append(str(error))  # the other images first
    print(f"{len(dataset) - len(failed)} images, detections.json, metrics.json -> {output}")
    if failed:
        raise UserError("; ".join(failed))


if __name__ == "__main__":
    usage.run(main)
