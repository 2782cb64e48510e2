"""Train SSD or SSDLite on a data set in COCO layout.

    python train.py --data-path /coco --model ssd --batch-size 32 --amp
    torchrun --nproc_per_node=8 train.py --data-path /coco --model ssd --batch-size 32 --amp

Stop it whenever you want (Ctrl-C): the same command goes on where it was.
"""

import atexit
import multiprocessing
import os
import signal
import sys
from pathlib import Path

import cv2
import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from src import distributed, usage
from src.boxes import Encoder, make_default_boxes
from src.checkpoint import fill, fine_tune_from, load_checkpoint, save_checkpoint
from src.dataset import CocoDataset, TrainSampler, ground_truth
from src.detector import Detector
from src.engine import evaluate, metrics_table, train_one_epoch
from src.loss import MultiBoxLoss
from src.model import build_model
from src.usage import UnreadablePicture, UserError


def parse_args():
    """The command line."""
    parser = usage.ArgumentParser(description=__doc__.splitlines()[0])
    positive, share = usage.number(int, 1), usage.number(float, 0, 1)
    add = parser.add_argument
    add("--data-path", default="/coco", help="folder with annotations/ and the pictures' folders")
    add("--train-set", default="train2017", help="folder of the training pictures")
    add("--val-set", default="val2017", help="folder of the validation pictures")
    add(
        "--model",
        choices=["ssd", "ssdlite"],
        default="ssd",
        help="SSD-ResNet50 or SSDLite-MobileNetV2",
    )
    add("--epochs", type=positive, default=65)
    add("--batch-size", type=usage.number(int, 2), default=32, help="pictures a process and step")
    add("--amp", action="store_true", help="mixed precision: float16 on a GPU, bfloat16 on a CPU")
    add(
        "--lr",
        type=usage.number(float, 0),
        default=2.6e-3,
        help="for 32 pictures a step; scaled with their number",
    )
    add("--momentum", type=share, default=0.9)
    add(
        "--weight-decay",
        type=usage.number(float, 0),
        default=5e-4,
        help="not on biases and batch norm",
    )
    add(
        "--multistep",
        type=positive,
        nargs="*",
        default=[43, 54],
        help="epochs after which lr is divided by 10",
    )
    add(
        "--warmup",
        type=usage.number(int, 0),
        default=300,
        help="iterations; at most the first epoch",
    )
    add("--nms-threshold", type=share, default=0.5, help="IoU above which a weaker box is removed")
    add(
        "--num-workers",
        type=usage.number(int, 0),
        default=4,
        help="loading processes for each training process",
    )
    add(
        "--save-folder",
        default="trained_models",
        help="checkpoints; training goes on from the one there",
    )
    add("--save-every", type=positive, help="iterations; default: save after every epoch")
    add("--log-path", default="tensorboard", help="TensorBoard's folder")
    add("--pretrained-model", help="checkpoint to fine-tune")
    add(
        "--no-pretrained-backbone",
        action="store_true",
        help="start from random weights, without ImageNet's",
    )
    add("--zoom-out", action="store_true", help="the paper's expansion (section 3.6)")
    add("--seed", type=usage.number(int, 0), default=123)
    add("--local-rank", type=int, help="set by torch.distributed.launch")  # we read LOCAL_RANK
    return parser.parse_args()


def say(text):
    """Print from one process only."""
    if distributed.rank() == 0:
        print(text, flush=True)


def stop_on_signals():
    """Return a function that gives the signal which asked to stop, or None.

    Ctrl-C and SIGTERM wait for the step under way; a second Ctrl-C leaves at once.
    """
    received = []

    def note(number, frame):
        received.append(number)
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    signal.signal(signal.SIGINT, note)
    signal.signal(signal.SIGTERM, note)
    return lambda: received[0] if received else None


def start_worker(worker):
    """In a loading process: one thread, and signals are the training process's business."""
    cv2.setNumThreads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def kill_workers():
    """At exit after an error: Python would wait for ever for workers that ignore SIGTERM."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler takes a killed one for a crash
    for worker in multiprocessing.active_children():
        worker.kill()


def make_folders(args):
    """Make the folders that training writes to: better an error now than after an epoch."""
    for option, folder in (("--save-folder", args.save_folder), ("--log-path", args.log_path)):
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{option} {folder}: cannot be made ({error.strerror})") from error
        if not os.access(folder, os.W_OK):
            raise UserError(f"{option} {folder}: may not be written to; choose another")


def make_loaders(args, train_set, val_set, sampler, device):
    """Loaders of this process's share of the training and validation pictures."""
    loading = {
        "num_workers": args.num_workers,
        "persistent_workers": args.num_workers > 0,
        "worker_init_fn": start_worker,
        "pin_memory": device.type == "cuda",
    }
    share = range(distributed.rank(), len(val_set), distributed.world_size())  # each picture once
    return (
        DataLoader(train_set, batch_sampler=sampler, **loading),
        DataLoader(val_set, args.batch_size, sampler=share, **loading),
    )


def look_over(train_set, val_set):
    """Say what was found and repaired; UserError if sets, or pictures and sizes, do not agree."""
    if train_set.category_ids != val_set.category_ids:
        raise UserError(
            f"{val_set.annotation_file}: its categories {val_set.category_ids} are not those of"
            f" {train_set.annotation_file}, {train_set.category_ids}: make them the same"
        )
    for name, data in (("training", train_set), ("validation", val_set)):
        share = range(distributed.rank(), len(data), distributed.world_size())
        quiet = distributed.rank() > 0
        data.check_sizes(tqdm(share, f"{name} pictures", disable=quiet, leave=False))
        counts = "".join(f", {count} {what}" for what, count in data.repairs.items())
        boxes = f"{len(data.boxes)} boxes of {len(data.classes) - 1} classes"
        say(f"{name}: {len(data)} pictures, {boxes}{counts}")


def find_stopped_run(file, options):
    """The checkpoint of a run to go on with, or None; says where it was, and what has changed."""
    state = load_checkpoint(file) if file.exists() else None
    if state and "optimizer" not in state:
        raise UserError(
            f"{file}: is no training to go on with; move it away,"
            " and give it as --pretrained-model to start from it"
        )
    place = [state["epoch"], state["samples_seen"]] if state else [-1, 0]
    if distributed.total(place) != [distributed.world_size() * value for value in place]:
        raise UserError(f"{file}: not the same for all processes; machines share --save-folder")
    if state:
        say(f"going on from {file}: {place[0]} epochs, {place[1]} pictures")
        for option, value in options.items():
            if state["args"].get(option, value) != value:
                say(f"changed since: {option} was {state['args'][option]}, is {value}")
    return state


def start_network(args, state, classes):
    """The network to train: as the checkpoint `state` left it, to be fine-tuned, or new."""
    pretrained = not (state or args.pretrained_model or args.no_pretrained_backbone)
    pretrained = pretrained and distributed.rank() == 0  # DDP hands rank 0's weights to all
    try:
        network = build_model(args.model, len(classes), pretrained)
    except OSError as error:
        raise UserError(
            f"no ImageNet weights ({error}): put them into {torch.hub.get_dir()}/checkpoints,"
            " or train from scratch with --no-pretrained-backbone"
        ) from error
    source = state or (args.pretrained_model and load_checkpoint(args.pretrained_model))
    if source and source["model"] != args.model:
        raise UserError(f"the checkpoint is of {source['model']}: use --model {source['model']}")
    if state:
        if state["classes"] != classes:
            raise UserError(
                f"{args.save_folder}: holds a training on {len(state['classes']) - 1} other classes"
                f" ({', '.join(state['classes'][1:4])}, ...): give another --save-folder"
            )
        fill(network, state["model_state_dict"], args.save_folder)
    elif source:
        say(fine_tune_from(network, source, classes, args.pretrained_model))
    return network


def make_optimizer(network, args, state):
    """SGD, as checkpoint `state` left it; no weight decay on biases and batch norm."""
    weights = [p for p in network.parameters() if p.ndim > 1]
    others = [p for p in network.parameters() if p.ndim == 1]
    groups = [{"params": weights}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(
        groups, args.lr, momentum=args.momentum, weight_decay=args.weight_decay, fused=True
    )
    if state:  # momentum from there, options from the command line
        options = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict(state["optimizer"] | {"param_groups": options})
    else:
        # Fused SGD leaves its buffers uninitialised if GradScaler skips the very first step.
        for p in network.parameters():
            optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return optimizer


def open_log(args, step, samples_seen):
    """TensorBoard's writer on rank 0; what an earlier run logged after `step` is hidden."""
    if distributed.rank() > 0:
        return None
    # At the end of an epoch the figures of its evaluation stand at `step` itself, and stay.
    evaluated = step > 0 and samples_seen == 0
    return SummaryWriter(Path(args.log_path) / args.model, purge_step=step + evaluated)


def write(log, group, figures, step):
    """Write {tag: figure} to TensorBoard."""
    if log:
        for tag, figure in figures.items():
            log.add_scalar(f"{group}/{tag}", figure, step)
        log.flush()


def main():
    """Seed, data, model, resume, then train and evaluate epoch by epoch."""
    args = parse_args()
    device = distributed.set_up()
    rank, world_size = distributed.rank(), distributed.world_size()
    options = vars(args) | {"world_size": world_size}  # a resumed run says what has changed
    del options["local_rank"]
    make_folders(args)
    atexit.register(kill_workers)
    torch.manual_seed(args.seed)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True

    # Data
    encoder = Encoder(make_default_boxes(args.model))
    train_set = CocoDataset(args.data_path, args.train_set, encoder, args.seed, args.zoom_out)
    val_set = CocoDataset(args.data_path, args.val_set)
    look_over(train_set, val_set)
    sampler = TrainSampler(len(train_set), args.batch_size, rank, world_size, args.seed)
    iterations = len(sampler)  # in an epoch
    train_loader, val_loader = make_loaders(args, train_set, val_set, sampler, device)
    truth = ground_truth(val_set.annotation_file) if rank == 0 else None

    # Model, and where a stopped run goes on
    checkpoint_file = Path(args.save_folder) / f"{args.model}.pth"
    state = find_stopped_run(checkpoint_file, options)
    network = start_network(args, state, train_set.classes)
    network = network.to(device, memory_format=torch.channels_last)
    model = DistributedDataParallel(network) if world_size > 1 else network
    criterion = MultiBoxLoss()
    optimizer = make_optimizer(network, args, state)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp and device.type == "cuda")
    first_epoch, samples_seen, best_map = 0, 0, -1.0
    if state:
        if state["scaler"] and scaler.is_enabled():
            scaler.load_state_dict(state["scaler"])
        first_epoch, samples_seen = state["epoch"], state["samples_seen"]
        best_map = state["best_map"]
    per_step = args.batch_size * world_size
    log = open_log(args, first_epoch * iterations + samples_seen // per_step, samples_seen)

    def learning_rate(epoch, iteration):
        """Linear warm-up within the first epoch; x0.1 after each of the multistep epochs."""
        lr = args.lr * per_step / 32 * 0.1 ** sum(epoch >= last for last in args.multistep)
        warmup = min(args.warmup, iterations)
        return lr * min(1, (epoch * iterations + iteration + 1) / max(1, warmup))

    def save(name, epoch, samples_seen, by=0):
        if not all(values.isfinite().all() for values in network.state_dict().values()):
            raise UserError(
                f"weights not finite in epoch {epoch + 1} after {samples_seen} pictures, so not"
                f" saved: lower --lr; {checkpoint_file} is as it was"
            )
        if rank == by:
            state = {
                "model": args.model,
                "model_state_dict": network.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scaler": scaler.state_dict(),
                "epoch": epoch,
                "samples_seen": samples_seen,
                "best_map": best_map,
                "classes": train_set.classes,
                "category_ids": train_set.category_ids,
                "args": options,
            }
            save_checkpoint(Path(args.save_folder) / name, state)

    def told_to_stop():
        """Whether any process was."""
        return distributed.total([float(bool(stopping()))])[0] > 0

    def leave():
        say(f"stopped; saved {checkpoint_file}, the same command goes on from there")
        distributed.tear_down()
        sys.exit(128 + (stopping() or signal.SIGTERM))

    stopping = stop_on_signals()
    for epoch in range(first_epoch, args.epochs):
        sampler.start(epoch, samples_seen)
        first_iteration = samples_seen // per_step
        steps = train_one_epoch(
            model, train_loader, criterion, optimizer, scaler, epoch, first_iteration,
            learning_rate, args.amp,
        )  # fmt: skip
        try:
            for iteration, figures in steps:
                samples_seen += per_step
                if figures:
                    write(log, "Train", figures, epoch * iterations + iteration)
                if args.save_every and (iteration + 1) % args.save_every == 0:
                    save(checkpoint_file.name, epoch, samples_seen)
                # GPUs run ahead of their processes; to agree at each step would hold them.
                agree = figures or world_size == 1 or device.type == "cpu"
                if agree and told_to_stop():
                    save(checkpoint_file.name, epoch, samples_seen)
                    leave()
        except UnreadablePicture:  # whichever process meets it: all have the same parameters
            save(checkpoint_file.name, epoch, samples_seen, by=rank)
            raise
        save(checkpoint_file.name, epoch, samples_seen)  # evaluation may take its time
        distributed.share_buffers(network)
        detector = Detector(
            network, args.model, train_set.classes, train_set.category_ids, device, args.amp
        )
        evaluation = evaluate(detector, val_loader, truth, args.nms_threshold)
        samples_seen = 0
        if rank == 0:
            metrics, _ = evaluation
            say(f"epoch {epoch + 1}\n{metrics_table(metrics)}")
            metrics.pop("per_class")
            metrics["mAP"] = metrics.pop("AP")
            write(log, "Test", metrics, (epoch + 1) * iterations)
        (mean_ap,) = distributed.total([metrics["mAP"] if rank == 0 else 0.0])  # known to all
        if mean_ap >= best_map:
            best_map = mean_ap
            save(f"{args.model}_best.pth", epoch + 1, 0)
        save(checkpoint_file.name, epoch + 1, 0)
        if told_to_stop():
            leave()
    say(f"{args.epochs} epochs done: {checkpoint_file}, best mAP {best_map:.3f}")
    distributed.tear_down()


if __name__ == "__main__":
    usage.run(main)
