"""Train SSD or SSDLite on a data set in COCO layout.

    python train.py --data-path /coco --model ssd --batch-size 32 --amp
    torchrun --nproc_per_node=8 train.py --data-path /coco --model ssd --batch-size 32 --amp

Stop it whenever you want (Ctrl-C): the same command goes on where it was.
"""

from src import usage

if __name__ == "__main__":
    usage.quit_on_ctrl_c()  # the imports below take seconds

import argparse
import atexit
import contextlib
import fcntl
import multiprocessing
import os
import signal
import socket
import sys
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from src import distributed
from src.annotations import ground_truth
from src.boxes import Encoder, make_default_boxes
from src.checkpoint import fill, fine_tune_from, load_checkpoint, save_checkpoint
from src.dataset import CocoDataset, TrainSampler, check_categories
from src.detector import Detector
from src.engine import METRICS, evaluate, metrics_table, train_one_epoch
from src.loss import MultiBoxLoss
from src.model import build_model
from src.usage import UnreadableImage, UserError
from src.visualize import draw_detections


def parse_args():
    """The command line."""
    parser = usage.ArgumentParser(description=__doc__.splitlines()[0])
    positive, share = usage.number(int, 1), usage.number(float, 0, 1)
    add = parser.add_argument
    add("--data-path", default="/coco", help="folder with annotations/ and the pictures' folders")
    add("--train-set", default="train2017", help="folder of the training pictures")
    add("--val-set", default="val2017", help="folder of the validation pictures")
    add("--model", choices=["ssd", "ssdlite"], default="ssd", help="SSD-ResNet50 or SSDLite-MobileNetV2")
    add("--epochs", type=positive, default=65)
    add("--batch-size", type=usage.number(int, 2), default=32, help="pictures a process and step")
    add("--amp", action="store_true", help="mixed precision: float16 on a GPU, bfloat16 on a CPU")
    add("--lr", type=usage.number(float, 0), default=2.6e-3, help="for 32 pictures a step; scaled with their number")
    add(
        "--backbone-lr-factor",
        type=usage.number(float, 0),
        default=1.0,
        metavar="FACTOR",
        help="learning rate of the backbone as a multiple of --lr; below 1 to fine-tune",
    )
    add("--momentum", type=share, default=0.9)
    add("--weight-decay", type=usage.number(float, 0), default=5e-4, help="not on biases and batch norm")
    add("--multistep", type=positive, nargs="*", default=[43, 54], help="epochs after which lr is divided by 10")
    add("--warmup", type=usage.number(int, 0), default=300, help="iterations; at most the first epoch")
    add("--nms-threshold", type=share, default=0.5, help="IoU above which a weaker box is removed")
    add("--num-workers", type=usage.number(int, 0), default=4, help="loading processes for each training process")
    add("--save-folder", default="trained_models", help="checkpoints; training goes on from the one there")
    add("--save-every", type=positive, help="iterations; without it, after every epoch")
    add("--log-path", default="tensorboard", help="TensorBoard's folder")
    add("--pretrained-model", help="checkpoint to fine-tune")
    add("--no-pretrained-backbone", action="store_true", help="start from random weights, without ImageNet's")
    add("--zoom-out", action="store_true", help="the paper's expansion (section 3.6)")
    add("--seed", type=usage.number(int, 0), default=123)
    # torch.distributed.launch gives it; we read LOCAL_RANK.
    add("--local-rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def say(text):
    """Print from one process only."""
    if distributed.rank() == 0:
        print(text, flush=True)


def stop_on_signals():
    """Return a list that fills with the signals which ask to stop.

    Ctrl-C, SIGTERM and SIGHUP (the terminal closes) wait for the step under way; a second Ctrl-C
    leaves at once. What `nohup` ignores stays ignored.
    """
    received = []

    def note(number, frame):
        received.append(number)
        with contextlib.suppress(OSError):  # the terminal may be gone
            os.write(2, b"\nfinishing the step, then saving; a second Ctrl-C leaves at once\n")
        usage.handle_signals(signal.SIG_DFL, [signal.SIGINT])

    usage.handle_signals(note)
    return received


def start_worker(worker):
    """In a loading process: one thread, and signals are the training process's business."""
    cv2.setNumThreads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


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


def lock(file):
    """Let no other run hold lock `file` until this process ends; returns who holds it, or ""."""
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)  # never closed
        # A POSIX lock: released when the process dies; forked workers do not inherit it.
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return os.read(descriptor, 999).decode() or "another run"
    except OSError as error:  # another user's file, or a network file system without locks
        say(f"{file}: no lock ({error.strerror}); make sure that no other run uses this folder")
        return ""
    os.truncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
    return ""


def lock_save_folder(args):
    """UserError if another run trains this model into --save-folder; every process ends then."""
    holder = ""
    if distributed.rank() == 0:
        holder = lock(Path(args.save_folder) / f"{args.model}.lock")
    if distributed.total([float(bool(holder))])[0]:
        if not holder:
            sys.exit(2)  # rank 0 says why
        raise UserError(f"--save-folder {args.save_folder}: in use by {holder}; give each run its own")


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
    check_categories(val_set, train_set.category_ids, train_set.classes, train_set.annotation_file)
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
            f"{file}: is no training to go on with; move it away, and give it as --pretrained-model to start from it"
        )
    place = [state["epoch"], state["samples_seen"]] if state else [-1, 0]
    if distributed.total(place) != [distributed.world_size() * value for value in place]:
        raise UserError(f"{file}: not the same for all processes; machines share --save-folder")
    if state:
        say(f"going on from {file}: {place[0]} epochs, {place[1]} pictures")
        for option, value in options.items():
            if state["args"].get(option, value) != value:
                say(f"changed since: {option} was {state['args'][option]}, is {value}")
        if state["epoch"] >= options["epochs"]:
            say("nothing left to train: raise --epochs, or give another --save-folder")
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
    """SGD, as checkpoint `state` left it; no weight decay on biases and batch norm.

    A group's "lr_factor" multiplies the learning rate of every step.
    """
    backbone = "backbone.", "feature_extractor."  # what its parameters' names start with
    groups = [
        {
            "params": [
                p
                for name, p in network.named_parameters()
                if (p.ndim > 1) == decays and name.startswith(backbone) == in_backbone
            ],
            "weight_decay": args.weight_decay if decays else 0.0,
            "lr_factor": args.backbone_lr_factor if in_backbone else 1.0,
        }
        for decays in (True, False)
        for in_backbone in (True, False)
    ]
    optimizer = torch.optim.SGD(groups, args.lr, momentum=args.momentum, fused=True)
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


def write_pictures(log, detector, val_set, step, count=4):
    """Show the first validation pictures in TensorBoard: what is found, and beside it the truth."""
    indices = range(min(count, len(val_set)))
    images = [val_set[index][0] for index in indices]  # at the network's size
    sizes = torch.full((len(images), 2), detector.size)
    found = detector.detect_resized(torch.from_numpy(np.stack(images)), sizes, score_threshold=0.3)
    for index, image, one in zip(indices, images, found, strict=True):
        boxes, labels = val_set.objects(index)  # of its own categories, perhaps fewer
        labels = np.searchsorted(detector.category_ids, np.take(val_set.category_ids, labels - 1))
        drawn = draw_detections(image, **one, classes=detector.classes)
        truth = draw_detections(image, boxes * detector.size, labels + 1, None, detector.classes)
        log.add_image(f"Test/Picture_{index}", np.hstack([drawn, truth]), step, dataformats="HWC")


def learning_rate(args, iterations, world_size, epoch, iteration):
    """Linear warm-up within the first epoch; x0.1 after each of the multistep epochs."""
    lr = args.lr * args.batch_size * world_size / 32
    warmup = max(1, min(args.warmup, iterations))
    lr *= min(1, (epoch * iterations + iteration + 1) / warmup)
    return lr * 0.1 ** sum(epoch >= last for last in args.multistep)


def save(file, run, network, optimizer, scaler, by=0):
    """Write the checkpoint from process `by`; UserError if a weight is not finite."""
    if not all(values.isfinite().all() for values in network.state_dict().values()):
        raise UserError(
            f"weights not finite in epoch {run['epoch'] + 1} after {run['samples_seen']} pictures,"
            f" so not saved: lower --lr; {file} is as it was"
        )
    if distributed.rank() == by:
        weights = {
            "model_state_dict": network.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(),
        }
        save_checkpoint(file, run | weights)


def told_to_stop(received):
    """Whether any process was; all of them ask at the same steps."""
    return distributed.total([float(bool(received))])[0] > 0


def leave(file, received):
    """End the run, saved to `file`, as a process ends that a signal has stopped."""
    say(f"stopped; saved {file}, the same command goes on from there")
    distributed.tear_down()
    sys.exit(128 + (received or [signal.SIGTERM])[0])


def main():
    """Seed, data, model, resume, then train and evaluate epoch by epoch."""
    args = parse_args()
    device = distributed.set_up()
    rank, world_size = distributed.rank(), distributed.world_size()
    options = vars(args) | {"world_size": world_size}  # a resumed run says what has changed
    del options["local_rank"]
    atexit.register(kill_workers)
    torch.manual_seed(args.seed)
    torch.backends.cudnn.benchmark = True

    # Data
    encoder = Encoder(make_default_boxes(args.model))
    train_set = CocoDataset(args.data_path, args.train_set, encoder, args.seed, args.zoom_out)
    val_set = CocoDataset(args.data_path, args.val_set)
    make_folders(args)
    lock_save_folder(args)
    look_over(train_set, val_set)
    classes, category_ids = train_set.classes, train_set.category_ids
    sampler = TrainSampler(len(train_set), args.batch_size, rank, world_size, args.seed)
    iterations = len(sampler)  # in an epoch
    train_loader, val_loader = make_loaders(args, train_set, val_set, sampler, device)
    truth = ground_truth(val_set.annotation_file) if rank == 0 else None

    # Model, and where a stopped run goes on
    latest, best = (Path(args.save_folder) / f"{args.model}{end}.pth" for end in ("", "_best"))
    state = find_stopped_run(latest, options)
    network = start_network(args, state, classes)
    network = network.to(device, memory_format=torch.channels_last)
    model = DistributedDataParallel(network) if world_size > 1 else network
    criterion = MultiBoxLoss()
    optimizer = make_optimizer(network, args, state)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp and device.type == "cuda")
    if state and state["scaler"] and scaler.is_enabled():
        scaler.load_state_dict(state["scaler"])
    run = {"epoch": 0, "samples_seen": 0, "best_map": -1.0}  # finished; of the next one; so far
    run = {key: state[key] if state else start for key, start in run.items()}
    run |= {"model": args.model, "classes": classes, "category_ids": category_ids, "args": options}
    everything = run, network, optimizer, scaler  # what a checkpoint holds
    per_step = args.batch_size * world_size
    first_step = run["epoch"] * iterations + run["samples_seen"] // per_step
    log = open_log(args, first_step, run["samples_seen"])

    received = stop_on_signals()
    for epoch in range(run["epoch"], args.epochs):
        sampler.start(epoch, run["samples_seen"])
        steps = train_one_epoch(
            model, train_loader, criterion, optimizer, scaler, epoch,
            run["samples_seen"] // per_step, partial(learning_rate, args, iterations, world_size),
            args.amp,
        )  # fmt: skip
        try:
            for iteration, figures in steps:
                run["samples_seen"] += per_step
                if figures:
                    write(log, "Train", figures, epoch * iterations + iteration)
                if args.save_every and (iteration + 1) % args.save_every == 0:
                    save(latest, *everything)
                # GPUs run ahead of their processes; to agree at each step would hold them.
                agree = figures or world_size == 1 or device.type == "cpu"
                if agree and told_to_stop(received):
                    save(latest, *everything)
                    leave(latest, received)
        except (UnreadableImage, OSError):  # a full disk for the log, perhaps
            # Whichever process meets it: all have the same parameters.
            save(latest, *everything, by=rank)
            raise
        save(latest, *everything)  # evaluation may take its time
        distributed.share_buffers(network)
        detector = Detector(network, args.model, classes, category_ids, device, args.amp)
        evaluation = evaluate(detector, val_loader, truth, args.nms_threshold)
        mean_ap = 0.0
        if rank == 0:
            metrics, _ = evaluation
            mean_ap = metrics["AP"]
            say(f"epoch {epoch + 1}\n{metrics_table(metrics)}")
            figures = {"mAP" if name == "AP" else name: metrics[name] for name in METRICS}
            write_pictures(log, detector, val_set, (epoch + 1) * iterations)
            write(log, "Test", figures, (epoch + 1) * iterations)
        (mean_ap,) = distributed.total([mean_ap])  # known to all
        run |= {"epoch": epoch + 1, "samples_seen": 0}
        if mean_ap >= run["best_map"]:
            run["best_map"] = mean_ap
            save(best, *everything)
        save(latest, *everything)
        if told_to_stop(received):
            leave(latest, received)
    measured = f"best mAP {run['best_map']:.3f}" if run["best_map"] >= 0 else "no mAP measured"
    say(f"{args.epochs} epochs done: {latest}, {measured}")
    distributed.tear_down()


if __name__ == "__main__":
    usage.run(main)
