"""Train SSD or SSDLite on a data set in COCO layout.

    python train.py --data-path /coco --model ssd --batch-size 32 --amp
    torchrun --nproc_per_node=8 train.py --data-path /coco --model ssd --batch-size 32 --amp

Stop it whenever you want (Ctrl-C): the same command resumes where it was.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # which `python -P` leaves out

from src import usage

if __name__ == "__main__":
    usage.quit_on_ctrl_c()  # the imports below take seconds

import argparse
import atexit
from functools import partial

import numpy as np
import torch
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from src import distributed, stopping
from src.annotations import ground_truth
from src.boxes import DEFAULT_BOXES, Encoder, make_default_boxes
from src.checkpoint import find_stopped_run, load_checkpoint, save_run, start_network
from src.dataset import CocoDataset, TrainSampler, check_categories
from src.detector import Detector
from src.distributed import print_rank0
from src.engine import METRICS, evaluate, make_optimizer, metrics_table, train_steps
from src.loss import MultiBoxLoss
from src.model import freeze
from src.usage import UnreadableImage, UserError
from src.visualize import draw_detections


def parse_args():
    """The command line."""
    parser = usage.ArgumentParser(description=__doc__)
    natural, positive = usage.number(int, 0), usage.number(int, 1)
    fraction, rate = usage.number(float, 0, 1), usage.number(float, 0)
    add = parser.add_argument_group("data").add_argument
    add("--data-path", default="/coco", help="folder with annotations/ and the images' folders")
    add("--train-set", default="train2017", help="folder of the training images")
    add("--val-set", default="val2017", help="folder of the validation images")
    add("--zoom-out", action="store_true", help="the paper's expansion (section 3.6)")
    add("--num-workers", type=natural, default=4, help="loading processes per training process")
    add = parser.add_argument_group("model").add_argument
    add("--model", choices=list(DEFAULT_BOXES), help="default: that of --pretrained-model, else ssd")
    add("--pretrained-model", help="checkpoint to fine-tune, from train.py or published")
    add("--no-pretrained-backbone", action="store_true", help="start from random weights, without ImageNet's")
    add("--freeze", action="store_true", help="keep the backbone's layers up to stride 8 as they are; to fine-tune")
    add("--nms-threshold", type=fraction, default=0.5, help="IoU above which a weaker box is removed")
    add = parser.add_argument_group("optimization").add_argument
    add("--epochs", type=positive, default=65, help="passes over the training images")
    add("--batch-size", type=usage.number(int, 2), default=32, help="images per process and step")
    add("--lr", type=rate, default=2.6e-3, help="for 32 images per step; scaled with their number")
    factor = "learning rate of the backbone as a multiple of --lr (default: 1, with --freeze 0.1)"
    add("--backbone-lr-factor", type=rate, metavar="FACTOR", help=factor)
    milestones = "epochs after which the learning rate is divided by 10 (default: 43/65 and 54/65 of --epochs)"
    add("--multistep", type=positive, nargs="*", metavar="EPOCH", help=milestones)
    add("--warmup", type=natural, help="iterations (default: 300, but at most the first epoch)")
    add("--momentum", type=fraction, default=0.9, help="of SGD")
    add("--weight-decay", type=rate, default=5e-4, help="not on biases and batch norm")
    add("--amp", action="store_true", help="mixed precision: float16 on a GPU, bfloat16 on a CPU")
    add("--seed", type=natural, default=123, help="of everything random")
    add = parser.add_argument_group("running").add_argument
    add("--save-folder", default="trained_models", help="checkpoints; the run in it is resumed")
    add("--save-every", type=positive, help="iterations; without it, after every epoch")
    add("--log-path", default="tensorboard", help="TensorBoard's folder")
    add("--local-rank", type=int, help=argparse.SUPPRESS)  # from torch.distributed.launch; LOCAL_RANK is used
    args = parser.parse_args()
    if args.model is None:
        args.model = load_checkpoint(args.pretrained_model)["model"] if args.pretrained_model else "ssd"
    if args.backbone_lr_factor is None:
        args.backbone_lr_factor = 0.1 if args.freeze else 1.0
    if args.multistep is None:
        args.multistep = sorted({round(args.epochs * share / 65) for share in (43, 54)})
    if args.freeze and args.no_pretrained_backbone and not args.pretrained_model:
        parser.error("--freeze would keep random weights: leave out --no-pretrained-backbone")
    return args


@distributed.naming_the_lost()
def main():
    """Seed, data, model, resume, then train and evaluate epoch by epoch."""
    args = parse_args()
    device = distributed.set_up()
    rank, world_size = distributed.rank(), distributed.world_size()
    atexit.register(stopping.kill_workers)
    torch.manual_seed(args.seed)
    torch.backends.cudnn.benchmark = True
    print_rank0(f"running on {distributed.devices(device)}")

    # Data
    encoder, size = Encoder(make_default_boxes(args.model)), DEFAULT_BOXES[args.model].input_size
    train_set = CocoDataset(args.data_path, args.train_set, encoder, args.seed, args.zoom_out, size)
    val_set = CocoDataset(args.data_path, args.val_set, size=size)
    classes, category_ids = train_set.classes, train_set.category_ids
    check_categories(val_set, category_ids, classes, train_set.annotation_file)
    if not len(train_set.boxes):
        raise UserError(f"{train_set.describe(train_set.annotation_file)}: no box to learn from; annotate some")
    sampler = TrainSampler(len(train_set), args.batch_size, rank, world_size, args.seed)
    iterations = len(sampler)  # in an epoch

    # A stopped run
    options = vars(args) | {"world_size": world_size}  # a resumed run says what has changed
    del options["local_rank"]
    for data in (train_set, val_set):
        data.check_folder()
    usage.make_folder("--save-folder", args.save_folder)
    usage.make_folder("--log-path", usage.utf8("--log-path", args.log_path))
    stopping.lock_save_folder(args.save_folder, args.model)
    latest, best = (Path(args.save_folder) / f"{args.model}{end}.pth" for end in ("", "_best"))
    stopped = find_stopped_run(latest, options)
    if args.pretrained_model and not stopped:
        usage.prepare_outputs([("--save-folder", latest), ("--save-folder", best)], [args.pretrained_model])
    check_sets(train_set, val_set, check_files=not stopped)  # a resumed run finds broken files as it loads them
    train_loader, val_loader = make_loaders(args, train_set, val_set, sampler, device)
    truth = ground_truth(val_set.annotation_file)

    # Model
    network = start_network(args, stopped, classes)
    if args.freeze:
        freeze(network)
    network = network.to(device, memory_format=torch.channels_last)
    model = distributed.maybe_ddp(network)
    criterion = MultiBoxLoss()
    sgd = args.lr, args.momentum, args.weight_decay, args.backbone_lr_factor
    optimizer = make_optimizer(network, *sgd, stopped)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp and device.type == "cuda")
    if stopped and stopped["scaler"] and scaler.is_enabled():
        scaler.load_state_dict(stopped["scaler"])
    progress = {
        "epoch": 0,  # epochs finished
        "samples_seen": 0,  # images of the next one already trained on, by all processes
        "best_map": -1.0,  # highest AP so far
    }
    progress = {key: stopped[key] if stopped else start for key, start in progress.items()}
    progress |= {"model": args.model, "classes": classes, "category_ids": category_ids, "args": options}
    everything = progress, network, optimizer, scaler  # what a checkpoint holds
    per_step = args.batch_size * world_size
    first_step = progress["epoch"] * iterations + progress["samples_seen"] // per_step
    log = open_log(args, first_step, progress["samples_seen"])

    received = stopping.stop_on_signals()
    for epoch in range(progress["epoch"], args.epochs):
        sampler.start(epoch, progress["samples_seen"])
        # A generator: each turn of the loop below trains one step, so that it can save or stop in between.
        steps = train_steps(
            model, train_loader, criterion, optimizer, scaler, epoch,
            progress["samples_seen"] // per_step, partial(learning_rate, args, iterations, world_size),
            args.amp,
        )  # fmt: skip
        try:
            for iteration, report in steps:
                progress["samples_seen"] += per_step
                if report:
                    write(log, "Train", report, epoch * iterations + iteration)
                if args.save_every and (iteration + 1) % args.save_every == 0:
                    save_run(latest, *everything)
                # CUDA is asynchronous; syncing every step would stall it, so agree only when logging.
                agree = report or world_size == 1 or device.type == "cpu"
                if agree and stopping.told_to_stop(received):
                    save_run(latest, *everything)
                    stopping.leave(latest, received)
        except (UnreadableImage, OSError):  # a full disk for the log, perhaps
            # Whichever process meets it: all have the same parameters (and their own running statistics).
            save_run(latest, *everything, by=rank)
            raise
        distributed.broadcast_buffers(network)
        save_run(latest, *everything)
        # Evaluation may take longer than the half minute that torchrun or a cluster leaves a process.
        stopping.stop_at_once(latest, received)
        detector = Detector(network, args.model, classes, category_ids, device, args.amp)
        metrics, _ = evaluate(detector, val_loader, truth, args.nms_threshold)
        distributed.barrier()  # all in time for the next signal
        received = stopping.stop_on_signals()
        if rank == 0:
            print_rank0(f"epoch {epoch + 1}\n{metrics_table(metrics)}")
            write_images(log, detector, val_set, (epoch + 1) * iterations)
            tags = {"mAP" if name == "AP" else name: metrics[name] for name in METRICS}
            write(log, "Test", tags, (epoch + 1) * iterations)
        progress |= {"epoch": epoch + 1, "samples_seen": 0}
        if metrics["AP"] >= progress["best_map"]:
            progress["best_map"] = metrics["AP"]
            save_run(best, *everything)
        save_run(latest, *everything)
        if stopping.told_to_stop(received):
            stopping.leave(latest, received)
    measured = f"best mAP {progress['best_map']:.3f}" if progress["best_map"] >= 0 else "no mAP measured"
    print_rank0(f"{args.epochs} epochs done: {latest}, {measured}")
    distributed.tear_down()


def check_sets(train_set, val_set, check_files):
    """Say what the sets hold and what was repaired; UserError if a file is missing or of another size."""
    for name, data in (("training", train_set), ("validation", val_set)):
        if check_files:
            share = range(distributed.rank(), len(data), distributed.world_size())
            data.check_files(tqdm(share, f"checking {name} images", disable=distributed.rank() > 0, leave=False))
        print_rank0(data.describe(name))


def make_loaders(args, train_set, val_set, sampler, device):
    """Loaders of this process's share of the training and validation images."""
    loading = {
        "num_workers": args.num_workers,
        "persistent_workers": args.num_workers > 0,
        "worker_init_fn": stopping.start_worker,
        "pin_memory": device.type == "cuda",
    }
    share = range(distributed.rank(), len(val_set), distributed.world_size())  # each image once
    return (
        DataLoader(train_set, batch_sampler=sampler, **loading),
        DataLoader(val_set, args.batch_size, sampler=share, **loading),
    )


def learning_rate(args, iterations, world_size, epoch, iteration):
    """Linear warm-up, then x0.1 after each of the multistep epochs; `iterations` per epoch."""
    lr = args.lr * args.batch_size * world_size / 32
    warmup = min(300, iterations) if args.warmup is None else args.warmup
    lr *= min(1, (epoch * iterations + iteration + 1) / max(1, warmup))
    return lr * 0.1 ** sum(epoch >= last for last in args.multistep)


def open_log(args, step, samples_seen):
    """TensorBoard's writer on rank 0; what an earlier run logged after `step` is hidden."""
    if distributed.rank() > 0:
        return None
    # At the end of an epoch the metrics of its evaluation are at `step` itself, and stay.
    evaluated = step > 0 and samples_seen == 0
    return SummaryWriter(Path(args.log_path) / args.model, purge_step=step + int(evaluated))


def write(log, group, numbers, step):
    """Write {tag: number} to TensorBoard."""
    if log:
        for tag, number in numbers.items():
            log.add_scalar(f"{group}/{tag}", number, step)
        log.flush()


def write_images(log, detector, val_set, step, count=4):
    """Show the first validation images in TensorBoard: what is found, and the truth to its right."""
    indices = range(min(count, len(val_set)))
    images = [val_set[index][0] for index in indices]  # at the network's size
    sizes = torch.full((len(images), 2), detector.size)
    found = detector.detect_resized(torch.from_numpy(np.stack(images)), sizes, score_threshold=0.3)
    for index, image, one in zip(indices, images, found, strict=True):
        boxes, labels = val_set.objects(index)  # of its own categories, perhaps fewer
        labels = np.searchsorted(detector.category_ids, np.take(val_set.category_ids, labels - 1))
        drawn = draw_detections(image, **one, classes=detector.classes)
        truth = draw_detections(image, boxes * detector.size, labels + 1, None, detector.classes)
        log.add_image(f"Test/Image_{index}", np.hstack([drawn, truth]), step, dataformats="HWC")


if __name__ == "__main__":
    usage.run(main)
