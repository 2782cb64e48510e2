"""Train SSD or SSDLite on a data set in COCO layout.

    python train.py --data-path /coco --model ssd --batch-size 32 --amp
    torchrun --nproc_per_node=8 train.py --data-path /coco --model ssd --batch-size 32 --amp

Stop it whenever you want (Ctrl-C, SIGTERM): it saves after the step, and the same command resumes there. After a power
failure it resumes from the last save: at the end of an epoch, or after --save-every iterations, and never half written.
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from src import distributed, stopping, usage
from src.annotations import load_ground_truth
from src.boxes import DEFAULT_BOXES, NMS_THRESHOLD, Encoder, make_default_boxes
from src.checkpoint import Run, load_checkpoint, start_network
from src.dataset import CocoDataset, TrainSampler, check_categories
from src.detector import Detector
from src.distributed import print_rank0
from src.engine import evaluate, make_optimizer, metrics_table, train_steps
from src.log import append_line, open_log, write, write_evaluation
from src.loss import MultiBoxLoss
from src.model import freeze
from src.usage import UserError


def parse_args():
    parser = usage.ArgumentParser(description=__doc__)
    natural = usage.number(int, 0)
    positive = usage.number(int, 1)
    fraction = usage.number(float, 0, 1)
    rate = usage.number(float, 0)
    add = parser.add_argument_group("data").add_argument
    add("--data-path", default="/coco", help="folder with annotations/ and the images' folders")
    add("--train-set", default="train2017", help="folder of the training images")
    add("--val-set", default="val2017", help="folder of the validation images")
    add("--zoom-out", action="store_true", help="the paper's expansion (section 3.6)")
    add("--no-flip", action="store_true", help="do not mirror images: for classes that are each other's mirror images")
    add("--num-workers", type=natural, default=4, help="loading processes per training process")
    add = parser.add_argument_group("model").add_argument
    add("--model", choices=list(DEFAULT_BOXES), help="default: that of --pretrained-model, else ssd")
    add("--pretrained-model", help="checkpoint to fine-tune, from train.py or published")
    add("--no-pretrained-backbone", action="store_true", help="start from random weights, without ImageNet's")
    add("--freeze", action="store_true", help="do not train the backbone up to stride 8; for fine-tuning")
    add("--nms-threshold", type=fraction, default=NMS_THRESHOLD, help="IoU above which a weaker box is removed")
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
    add("--seed", type=natural, default=123, help="of all random numbers")
    add = parser.add_argument_group("running").add_argument
    add("--device", help="cpu, cuda, cuda:1 or mps (default: the CUDA GPU if there is one)")
    add("--save-folder", default="trained_models", help="checkpoints; the run in it is resumed")
    add("--save-every", type=positive, metavar="N", help="also save every N iterations (default: each epoch)")
    add("--log-path", default="tensorboard", help="TensorBoard's folder")
    add("--local-rank", type=int, help=argparse.SUPPRESS)  # from torch.distributed.launch; LOCAL_RANK is used
    args = parser.parse_args()
    if args.model is None:
        args.model = load_checkpoint(args.pretrained_model)["model"] if args.pretrained_model else "ssd"
    if args.backbone_lr_factor is None:
        args.backbone_lr_factor = 0.1 if args.freeze else 1.0
    if args.multistep is None:
        args.multistep = sorted({round(args.epochs * share / 65) for share in (43, 54)})
    if args.amp and args.device in ("mps", "mps:0"):
        parser.error("--amp does not train on mps: without loss scaling small gradients vanish; leave it out")
    if args.freeze and args.no_pretrained_backbone and not args.pretrained_model:
        parser.error("--freeze would keep random weights: leave out --no-pretrained-backbone")
    del args.local_rank
    return args


@distributed.report_lost_ranks()
def main():
    """Data, model, optimizer, resume; then train and evaluate, epoch by epoch."""
    args = parse_args()
    device = distributed.set_up(args.device)
    torch.manual_seed(args.seed)
    torch.backends.cudnn.benchmark = True
    print_rank0(f"running on {distributed.describe_devices(device)}" + distributed.amp_note(device, args.amp))

    # Data. CocoDataset turns category ids into labels (to_labels in src/classes.py); `evaluate` turns them back.
    train_set, val_set = open_sets(args)
    sampler = TrainSampler(len(train_set), args.batch_size, distributed.rank(), distributed.world_size(), args.seed)
    per_step = args.batch_size * distributed.world_size()
    iterations = len(sampler)  # in a whole epoch
    latest, best = prepare_folders(args)
    stoppable = stopping.Stoppable(latest)  # from here on no other run may write to this file
    resuming = latest.exists()
    if not resuming:
        check_files(args, train_set, val_set, [latest, best])
    train_loader, val_loader = make_loaders(args, train_set, val_set, sampler, device)
    ground_truth = load_ground_truth(val_set.annotation_file)

    # Model and optimizer
    network = start_network(args, train_set.classes, resuming)
    if args.freeze:
        freeze(network)
    network = network.to(device, memory_format=torch.channels_last)
    criterion = MultiBoxLoss()
    optimizer = make_optimizer(network, args.momentum, args.weight_decay, args.backbone_lr_factor)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp and device.type == "cuda")
    schedule = partial(learning_rate, args, iterations, distributed.world_size())  # (epoch, iteration) -> rate
    print_rank0(describe_schedule(args, iterations, schedule))

    # Resume
    options = vars(args) | {"world_size": distributed.world_size()}  # saved; a resumed run prints what changed
    run = Run(args.model, network, optimizer, scaler, train_set.classes, train_set.category_ids, options)
    run.resume(latest)  # if it exists: weights, momentum, loss scale, epoch, samples seen and best AP

    # Train and evaluate
    ddp_network = distributed.maybe_ddp(network)  # the same weights; with several processes it averages gradients
    log = open_log(Path(args.log_path) / args.model, run, per_step, iterations)
    with stoppable.saving(run):  # also if an unreadable image or a full disk ends the loop
        for epoch in range(run.epoch, args.epochs):
            sampler.start(epoch, run.samples_seen)
            # A generator: each turn of the loop below sets the learning rate, trains one step and counts its samples.
            # Every tenth step and the epoch's last yield a report of the losses, the others None.
            steps = train_steps(
                run, train_loader, network=ddp_network, criterion=criterion, schedule=schedule, amp=args.amp
            )
            for iteration, report in steps:
                if report:
                    write(log, "Train", report, epoch * iterations + iteration)
                if args.save_every and (iteration + 1) % args.save_every == 0:
                    run.save(latest)
                stoppable.after_step(report)  # if a signal came: save and exit; on several GPUs at the next report
            distributed.broadcast_buffers(network)  # batch norm's statistics differ between processes
            run.save(latest)  # trained but not evaluated: if stopped from here on, only the evaluation is repeated
            with stoppable.evaluation():
                detector = Detector(network, args.model, run.classes, run.category_ids, device, args.amp)
                metrics, detections = evaluate(detector, val_loader, ground_truth, args.nms_threshold)
            print_rank0(f"epoch {epoch + 1}\n{metrics_table(metrics)}")
            write_evaluation(log, metrics, detections, val_set, run, (epoch + 1) * iterations)
            append_line(Path(args.save_folder) / "metrics.jsonl", {"model": args.model, "epoch": epoch + 1} | metrics)
            run.epoch, run.samples_seen = epoch + 1, 0  # one more epoch is finished
            if metrics["AP"] >= run.best_ap:
                run.best_ap = metrics["AP"]
                run.save(best)
            run.save(latest)
    measured = f"best mAP {run.best_ap:.3f}" if run.best_ap >= 0 else "no mAP measured"
    print_rank0(f"{args.epochs} epochs done: {latest}, {measured}")
    distributed.tear_down()


def open_sets(args):
    """The training and the validation set; UserError if they do not agree, or hold nothing to learn."""
    encoder = Encoder(make_default_boxes(args.model))
    size = DEFAULT_BOXES[args.model].input_size
    train_set = CocoDataset(args.data_path, args.train_set, encoder, args.seed, args.zoom_out, size, not args.no_flip)
    val_set = CocoDataset(args.data_path, args.val_set, size=size)
    check_categories(val_set, train_set.category_ids, train_set.classes, train_set.annotation_file)
    if not len(train_set.boxes):
        raise UserError(f"{train_set.describe(train_set.annotation_file)}: no box to learn from; annotate some")
    for name, data in (("training", train_set), ("validation", val_set)):
        data.check_folder()
        print_rank0(data.describe(name, encoder))
    return train_set, val_set


def prepare_folders(args):
    """Make the folders that the run writes to; returns its latest and its best checkpoint (Paths)."""
    usage.make_folder("--save-folder", args.save_folder)
    usage.make_folder("--log-path", usage.utf8("--log-path", args.log_path))
    return [Path(args.save_folder) / f"{args.model}{end}.pth" for end in ("", "_best")]


def check_files(args, train_set, val_set, checkpoints):
    """UserError if an image is missing or broken, or if a checkpoint would replace the one that training starts from.

    For new runs only: it takes minutes on COCO. A resumed run stops at a broken image when it loads it.
    """
    if args.pretrained_model:
        usage.prepare_outputs([("--save-folder", file) for file in checkpoints], [args.pretrained_model])
    train_set.check_files("training")
    val_set.check_files("validation")


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
    return lr * 0.1 ** sum(epoch >= milestone for milestone in args.multistep)


def describe_schedule(args, iterations, schedule):
    """The schedule in one line; schedule(epoch, iteration) is the learning rate, `iterations` per epoch."""
    starts = [0, *(milestone for milestone in sorted(args.multistep) if milestone < args.epochs)]
    rates = [f"{schedule(start, 10**9):.2g} from epoch {start + 1}" for start in starts]  # long after the warm-up
    return f"{args.epochs} epochs of {iterations} iterations; learning rate after warm-up: {', '.join(rates)}"


if __name__ == "__main__":
    usage.run(main)
