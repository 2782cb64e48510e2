"""Save and resume a run, start its network, and read checkpoints, ours and published ones.

Nothing that is read is ever executed.
"""

import hashlib
import os
import pickle
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from src import distributed
from src.boxes import DEFAULT_BOXES
from src.classes import COCO_CATEGORY_IDS, COCO_CLASSES, VOC_CLASSES, matching_labels
from src.distributed import is_main_process, print_rank0
from src.model import IMAGENET_WEIGHTS, MODELS, build_model
from src.transform import IMAGENET_MEAN, IMAGENET_STD
from src.usage import UserError, is_lfs_pointer

# The networks of qfgaohao/pytorch-ssd, each with a parameter that none of those below it has.
QFGAOHAO_NETWORKS = {
    "base_net.3.squeeze.weight": "sq-ssd-lite",
    "base_net.3.conv1.weight": "mb3-ssd-lite",
    "source_layer_add_ons.0.weight": "vgg16-ssd",
    "extras.0.2.0.weight": "mb1-ssd-lite",
    "base_net.1.0.weight": "mb1-ssd",
    "base_net.1.conv.0.weight": "mb2-ssd-lite",
}
OUR_KEYS = {"model_state_dict": dict, "classes": list, "category_ids": list}


@dataclass
class Run:
    """What a training run is, and what its checkpoints hold."""

    model: str  # "ssd" or "ssdlite"
    network: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    classes: list  # names, index 0 "background"
    category_ids: list  # label k is category category_ids[k - 1]
    options: dict  # of the command line
    epoch: int = 0  # epochs finished
    samples_seen: int = 0  # images of the epoch under way that were trained on, by all processes
    best_ap: float = -1.0  # the highest AP so far

    def save(self, file, rank=0):
        """Write the checkpoint from process `rank`; UserError if a weight is not finite."""
        if not all(values.isfinite().all() for values in self.network.state_dict().values()):
            raise UserError(
                f"weights not finite in epoch {self.epoch + 1} after {self.samples_seen} images,"
                f" so not saved: lower --lr; {file} is as it was"
            )
        if distributed.rank() != rank:
            return
        state = {
            "model": self.model,
            "model_state_dict": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": self.epoch,
            "samples_seen": self.samples_seen,
            "best_map": self.best_ap,
            "classes": self.classes,
            "category_ids": self.category_ids,
            "args": self.options,
        }
        save_checkpoint(file, state)

    def resume(self, file):
        """Continue the run saved in `file`, if it exists; says where it was and which options changed. Collective.

        UserError if the file is not a run of this model on these classes.
        """
        checkpoint = load_checkpoint(file) if file.exists() else None
        if checkpoint and "optimizer" not in checkpoint:
            raise UserError(
                f"{file}: has no optimizer state, so it cannot be resumed; move it away, and give it as"
                " --pretrained-model to start from it"
            )
        position = [checkpoint["epoch"], checkpoint["samples_seen"]] if checkpoint else [-1, 0]
        if distributed.all_reduce(position) != [distributed.world_size() * value for value in position]:
            raise UserError(f"{file}: differs between processes: --save-folder must be storage that all machines share")
        if not checkpoint:
            return
        check_model(checkpoint, self.model)
        if checkpoint["classes"] != self.classes:
            raise UserError(
                f"{file.parent}: holds a run on {len(checkpoint['classes']) - 1} other classes"
                f" ({', '.join(checkpoint['classes'][1:4])}, ...): give another --save-folder"
            )
        load_weights(self.network, checkpoint["model_state_dict"], file)
        # The momentum is the checkpoint's; learning rate, weight decay and so on are the command line's.
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict(checkpoint["optimizer"] | {"param_groups": groups})
        if checkpoint["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(checkpoint["scaler"])
        self.epoch, self.samples_seen, self.best_ap = (checkpoint[key] for key in ("epoch", "samples_seen", "best_map"))
        print_rank0(f"resuming from {file}: {self.epoch} epochs, {self.samples_seen} images")
        for option, value in self.options.items():
            before = checkpoint["args"].get(option, value)
            if before != value:
                print_rank0(f"changed since: {option} was {before}, is {value}")
        if self.epoch >= self.options["epochs"]:
            print_rank0("nothing left to train: raise --epochs, or give another --save-folder")


def check_model(checkpoint, model):
    """UserError if the checkpoint is of another model."""
    if checkpoint["model"] != model:
        raise UserError(f"the checkpoint is of {checkpoint['model']}: use --model {checkpoint['model']}")


def start_network(args, classes, resuming):
    """The network of a new run, by default with ImageNet's weights; `Run.resume` loads those of a run to be resumed.

    Only rank 0 has ImageNet's weights: DDP hands them to all processes.
    """
    imagenet = not (resuming or args.pretrained_model or args.no_pretrained_backbone)
    if imagenet and is_main_process():
        return with_imagenet(args.model, len(classes))
    network = build_model(args.model, len(classes), pretrained_backbone=False)
    if args.pretrained_model and not resuming:
        checkpoint = load_checkpoint(args.pretrained_model)
        check_model(checkpoint, args.model)
        fresh = load_matching_weights(network, checkpoint, classes, args.pretrained_model)
        heads = f"these start fresh: {', '.join(fresh)}" if fresh else "none starts fresh"
        print_rank0(f"{args.pretrained_model}: loaded ({checkpoint['origin']}), class heads by name, {heads}")
    return network


def with_imagenet(model, num_classes):
    """A new network with ImageNet's weights, which torchvision downloads once; UserError if there are none."""
    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(IMAGENET_WEIGHTS[model].url).name
    try:
        return build_model(model, num_classes, pretrained_backbone=True)
    except Exception as error:  # torch's reader meets a broken file with all sorts of errors
        if isinstance(error, PermissionError) or not file.exists():
            raise UserError(
                f"no ImageNet weights ({error}): put them into {file.parent},"
                " or train from scratch with --no-pretrained-backbone"
            ) from error
        if hashlib.sha256(file.read_bytes()).hexdigest().startswith(file.stem.rpartition("-")[2]):
            raise  # the file is as it should be
        raise UserError(f"{file}: cut short, or not the weights of that name: delete it, and start again") from error


def save_checkpoint(path, state):
    """Write `state` so that `path` holds either the old checkpoint or all of the new one."""
    path = Path(path)
    # No one else writes into it: process ids may repeat on another machine; within a run, ranks do not.
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}_{distributed.rank()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        if temporary.is_file():
            temporary.unlink()
        reason = getattr(error, "strerror", None) or "is the disk full?"
        raise UserError(
            f"{path}: cannot be written ({reason}); what it held before is kept:"
            " make room, or give another --save-folder"
        ) from error


def load_checkpoint(path):
    """Read a checkpoint, ours or a published one, as a dict with our keys.

    At least `model` (name), `model_state_dict`, `classes` and `category_ids`, all on the CPU, and
    `origin`, a line for the user. Raises UserError if the file is not a checkpoint.
    """
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such checkpoint; train one, or give its path")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError as error:
        raise UserError(f"{path}: may not be read; change its permissions") from error
    except Exception as error:  # torch's reader meets a broken file with all sorts of errors
        if is_lfs_pointer(path):
            what = "a Git LFS pointer, not the checkpoint itself: run git lfs pull"
        elif "TorchScript" in str(error):
            what = "a TorchScript file, a program and not a checkpoint; give what it was made from"
        elif isinstance(error, pickle.UnpicklingError):
            what = "not a checkpoint of tensors and plain values; nothing in it was run"
        else:
            what = f"a broken checkpoint ({(str(error) or type(error).__name__).splitlines()[0]}); use another"
        raise UserError(f"{path}: {what}") from error
    if not isinstance(state, dict):
        raise UserError(f"{path}: holds a {type(state).__name__}, not a checkpoint")
    if isinstance(state.get("model"), str):
        if state["model"] not in MODELS:
            raise UserError(f"{path}: model {state['model']!r} is not one of ours; use another checkpoint")
        wrong = [key for key, kind in OUR_KEYS.items() if not isinstance(state.get(key), kind)]
        if wrong or not labels_fit(state["classes"], state["category_ids"]):
            problem = f"{', '.join(wrong)} missing or of another type" if wrong else "classes or category_ids amiss"
            raise UserError(f"{path}: model {state['model']!r}, {problem}: not one of ours; use another")
        if state["model"] == "ssdlite":  # until 2026-11 a checkpoint had no mean: it was ImageNet's
            state["model_state_dict"].setdefault("backbone.mean", torch.zeros(3, 1, 1))
        return state | {"origin": f"checkpoint of this project, {state['model']}"}
    return read_published(state, path)


def labels_fit(classes, category_ids):
    """True if `classes` are "background" and a name for each of `category_ids`, whole numbers in ascending order."""
    named = classes[:1] == ["background"] and all(isinstance(name, str) for name in classes)
    whole = all(isinstance(i, int) for i in category_ids)
    return named and whole and category_ids == sorted(set(category_ids)) and len(classes) == 1 + len(category_ids)


def read_published(state, path):
    """Read one of the three published layouts as a dict with our keys; UserError if it is none of them."""
    state = {str(key).removeprefix("module."): value for key, value in state.items()}
    ssd_keys = "model", "model_state_dict"  # of the weights: NVIDIA's and uvipen's SSD-ResNet50
    key = next((key for key in ssd_keys if isinstance(state.get(key), dict)), None)
    if key:
        model = "ssd"
        weights = state[key]
        names = names_from(state.get("label_map"), path)
        origin = f"published SSD-ResNet50, {key!r}" + (" with 'label_map'" if state.get("label_map") else "")
    elif isinstance(state.get("classification_headers.5.bias"), torch.Tensor):  # qfgaohao's SSDLite: bare weights
        refuse_other_networks(state, path)
        num_classes = state["classification_headers.5.bias"].numel() // DEFAULT_BOXES["ssdlite"].per_cell[-1]
        if num_classes < 2:
            raise UserError(f"{path}: no class in its classification headers; use another")
        model = "ssdlite"
        weights = convert_qfgaohao(state, num_classes, path)
        names, source = names_beside(path, num_classes - 1)
        origin = f"published SSDLite-MobileNetV2, {source}"
    else:
        raise UserError(
            f"{path}: keys {sorted(map(str, state))[:6]} are of no known checkpoint;"
            " bare weights of SSD-ResNet50 go into {'model_state_dict': weights}, of qfgaohao's mb2-ssd-lite stay bare"
        )
    return {
        "model": model,
        "model_state_dict": {str(k).removeprefix("module."): v for k, v in weights.items()},
        "classes": ["background", *names],
        "category_ids": COCO_CATEGORY_IDS if names == COCO_CLASSES else list(range(1, 1 + len(names))),
        "origin": origin,
    }


def names_from(label_map, path):
    """Class names from a published checkpoint's {0: "background", 1: "person", ...}, or COCO's."""
    if not label_map:
        return COCO_CLASSES
    if not isinstance(label_map, dict) or set(label_map) != set(range(len(label_map))):
        raise UserError(f"{path}: 'label_map' is not {{0: 'background', 1: a name, ...}}")
    return [str(label_map[k]) for k in range(1, len(label_map))]


def names_beside(path, count):
    """Names of `count` classes from labels.txt beside the checkpoint, or VOC's; and where they are from."""
    names = [f"class {n}" for n in range(1, 1 + count)]
    origin = "no names"
    hint = ": put a labels.txt beside it"
    if count == len(VOC_CLASSES):
        names = VOC_CLASSES
        origin = "VOC's classes"
        hint = ""
    file = Path(path).with_name("labels.txt")
    if not file.is_file():
        return names, origin + hint
    try:
        labels = [label.strip() for label in file.read_text(encoding="utf-8-sig").split("\n") if label.strip()]
    except UnicodeDecodeError:
        return names, f"{origin} ({file} is not UTF-8: not used)"
    if labels and labels[0].lower() == "background":
        del labels[0]
    if len(labels) != count or len(set(labels)) < count:
        return names, f"{origin} ({file} has {len(set(labels))} names, not {count}: not used)"
    return labels, f"names from {file}"


def refuse_other_networks(published, path):
    """UserError for the weights of qfgaohao's other networks."""
    kind = next((name for key, name in QFGAOHAO_NETWORKS.items() if key in published), "an unknown network")
    if kind == "mb2-ssd-lite":
        first = published.get("base_net.0.0.weight")
        width = len(first) / 32 if getattr(first, "ndim", 0) == 4 else 1  # else `load_weights` says what is wrong
        if width == 1:
            return
        kind = f"{kind} of width {width:g}"
    raise UserError(f"{path}: {kind} of qfgaohao/pytorch-ssd is not supported: use its mb2-ssd-lite of width 1")


@torch.no_grad()
def convert_qfgaohao(published, num_classes, path):
    """Turn the weights of qfgaohao's mb2-ssd-lite into ours, which compute the same from an image of 300 x 300."""
    network = build_model("ssdlite", num_classes, pretrained_backbone=False)
    separable = [head for head in (*network.loc, *network.conf) if isinstance(head, nn.Sequential)]
    for head in separable:
        head[0].bias = nn.Parameter(torch.zeros(head[0].out_channels))  # theirs has one
    # 1. Names. Theirs number the layers of a block in one row, activations included; ours are in groups.
    blocks = [("base_net.0", 3), ("base_net.1.conv", 5), *((f"base_net.{n}.conv", 8) for n in range(2, 18))]
    blocks += [("base_net.18", 3), *((f"extras.{n}.conv", 8) for n in range(4))]
    theirs = [f"{block}.{n}" for block, layers in blocks for n in range(layers)]
    ours = [name for name, layer in network.named_modules() if not list(layer.children())]
    names = dict(zip(theirs, (name for name in ours if not name.startswith(("loc", "conf"))), strict=True))
    weights = {}
    for name, values in published.items():
        layer, _, parameter = name.rpartition(".")
        layer = layer.replace("regression_headers", "loc").replace("classification_headers", "conf")
        weights[f"{names.get(layer, layer)}.{parameter}"] = values
    # 2. Pixels: (x - 127) / 128. The deviation is folded into the first convolution. The mean cannot be, since
    # that pads with zeros after it is subtracted: the network subtracts it. Exact, but for float32's rounding.
    mean, std = torch.tensor([IMAGENET_MEAN, IMAGENET_STD])[..., None, None]  # (3, 1, 1) each
    load_weights(network, weights | {"backbone.mean": (127 / 255 - mean) / std}, path)
    network.backbone.to_stride_16[0][0].weight.mul_(255 / 128 * std)
    # 3. A bias before a batch norm becomes part of its mean.
    for head in separable:
        head[1].running_mean -= head[0].bias
        head[0].bias = None
    # 4. A head's channels: box * values + value there, value * boxes + box here.
    for heads, values in ((network.loc, 4), (network.conf, num_classes)):
        for head in heads:
            last = head[-1] if head in separable else head
            for parameter in (last.weight, last.bias):
                parameter.copy_(parameter.unflatten(0, (-1, values)).transpose(0, 1).flatten(0, 1))
    return network.state_dict()


def network_from(checkpoint, path):
    """Build the network of a loaded checkpoint and load its weights, wholly or not at all."""
    network = build_model(checkpoint["model"], len(checkpoint["classes"]), pretrained_backbone=False)
    load_weights(network, checkpoint["model_state_dict"], path)
    return network


def load_weights(network, weights, path):
    """Load `weights` into `network`; UserError with the names where they do not fit exactly."""
    wanted = network.state_dict()
    if not all(isinstance(values, torch.Tensor) for values in weights.values()):
        raise UserError(f"{path}: its weights are not all tensors; use another")
    misfits = {
        "missing": [name for name in wanted if name not in weights],
        "unexpected": [name for name in weights if name not in wanted],
        "of another shape": [
            f"{name} {tuple(weights[name].shape)} instead of {tuple(wanted[name].shape)}"
            for name in wanted
            if name in weights and weights[name].shape != wanted[name].shape
        ],
    }
    misfits = {kind: names for kind, names in misfits.items() if names}
    if misfits:
        raise UserError(
            f"{path}: does not fit the model: "
            + "; ".join(
                f"{len(names)} {kind} ({', '.join(map(str, names[:3]))}{', ...' if len(names) > 3 else ''})"
                for kind, names in misfits.items()
            )
        )
    network.load_state_dict(weights)


def load_matching_weights(network, checkpoint, classes, path):
    """Load a checkpoint's weights into a network for other `classes`; returns the names of those that start fresh.

    Rows of the class heads follow the names of the classes, VOC's or COCO's; only those of new names start fresh.
    """
    known = checkpoint["classes"]
    source = type(network)(network.default_boxes, len(known), pretrained_backbone=False)
    load_weights(source, checkpoint["model_state_dict"], path)
    weights = source.state_dict()
    fresh_weights = network.state_dict()
    here, there = map(list, zip(*matching_labels(classes, known), strict=True))
    for layer, module in network.named_modules():
        # The layer that classifies, in either model: a head's only convolution with a bias.
        if layer.startswith("conf.") and isinstance(module, nn.Conv2d) and module.bias is not None:
            for name in (f"{layer}.weight", f"{layer}.bias"):  # rows: class * k + shape
                rows = fresh_weights[name].unflatten(0, (len(classes), -1)).clone()
                rows[here] = weights[name].unflatten(0, (len(known), -1))[there]
                weights[name] = rows.flatten(0, 1)
    network.load_state_dict(weights)
    return [name for label, name in enumerate(classes) if label not in here]
