"""train.py: its recipe at hand-worked points, and what main hands on, in one process and in two.

The networks that main makes are real; training and evaluation are spies that note what they get.
"""

import contextlib
import lzma
import os
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from runs import free_port, in_processes, join
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.models import mobilenet_v2
from torchvision.transforms.functional import normalize, to_tensor

import train
from src import distributed
from src.checkpoint import start_network
from src.engine import METRICS, make_optimizer
from src.images import read_image
from src.log import write_images
from src.model import build_model
from src.transform import resize
from src.visualize import class_color

SHARED = Path(__file__).parents[2] / "shared"
SHAPES = Path(__file__).parents[1] / "demo" / "ssdlite_shapes.pth"
IMAGENET_FILE = "mobilenet_v2-7ebf99e0.pth"  # the name under which torchvision keeps its weights
RECIPE = {"lr": 2.6e-3, "batch_size": 32, "warmup": 300, "multistep": [43, 54]}


@pytest.mark.parametrize(
    "epoch, iteration, expected",
    [
        (0, 0, 2.6e-3 / 300),
        (0, 149, 1.3e-3),
        (0, 299, 2.6e-3),
        (0, 999, 2.6e-3),
        (42, 999, 2.6e-3),  # the last step of the 43rd epoch
        (43, 0, 2.6e-4),
        (53, 999, 2.6e-4),
        (54, 0, 2.6e-5),
        (64, 999, 2.6e-5),
    ],
)
def test_learning_rate_is_the_recipes(epoch, iteration, expected):
    args = SimpleNamespace(**RECIPE)
    assert train.learning_rate(args, 1000, 1, epoch, iteration) == pytest.approx(expected)


@pytest.mark.parametrize(
    "options, multistep",
    [
        ([], [43, 54]),  # the recipe's 65 epochs
        (["--epochs", "40"], [26, 33]),
        (["--epochs", "16"], [11, 13]),
        (["--epochs", "4"], [3]),  # once, not twice after the same epoch
        (["--epochs", "16", "--multistep", "9"], [9]),
        (["--epochs", "16", "--multistep"], []),  # never
    ],
)
def test_the_learning_rate_falls_at_the_same_shares_of_any_number_of_epochs(monkeypatch, options, multistep):
    monkeypatch.setattr("sys.argv", ["train.py", *options])
    assert train.parse_args().multistep == multistep


@pytest.mark.parametrize("batch_size, world_size, factor", [(32, 8, 8), (16, 1, 0.5), (4, 2, 0.25)])
def test_learning_rate_grows_with_the_images_of_a_step(batch_size, world_size, factor):
    args = SimpleNamespace(**RECIPE | {"batch_size": batch_size})
    assert train.learning_rate(args, 1000, world_size, 5, 0) == pytest.approx(2.6e-3 * factor)


@pytest.mark.parametrize(
    "epochs, multistep, rates",
    [
        (65, [43, 54], "0.0026 from epoch 1, 0.00026 from epoch 44, 2.6e-05 from epoch 55"),
        (20, [43, 54], "0.0026 from epoch 1"),  # it never falls
        (3, [2, 1], "0.0026 from epoch 1, 0.00026 from epoch 2, 2.6e-05 from epoch 3"),
    ],
)
def test_the_schedule_is_said_in_one_line(epochs, multistep, rates):
    args = SimpleNamespace(**RECIPE | {"epochs": epochs, "multistep": multistep})
    line = train.describe_schedule(args, 1000, partial(train.learning_rate, args, 1000, 1))
    assert line == f"{epochs} epochs of 1000 iterations; learning rate after warm-up: {rates}"


@pytest.mark.parametrize("options, mirror", [([], True), (["--no-flip"], False)])
def test_no_flip_reaches_the_training_set(shapes_folder, monkeypatch, options, mirror):
    monkeypatch.setattr("sys.argv", ["train.py", "--data-path", str(shapes_folder), *options])
    assert train.open_sets(train.parse_args())[0].mirror == mirror


def test_warm_up_may_outlast_the_first_epoch_or_be_left_out():
    args = SimpleNamespace(**RECIPE)
    assert train.learning_rate(args, 100, 1, 1, 49) == pytest.approx(1.3e-3)
    assert train.learning_rate(args, 100, 1, 2, 99) == pytest.approx(2.6e-3)
    args = SimpleNamespace(**RECIPE | {"warmup": 0})
    assert train.learning_rate(args, 100, 1, 0, 0) == pytest.approx(2.6e-3)


@pytest.mark.parametrize("options, reached", [([], 1.0), (["--warmup", 12], 0.5), (["--warmup", 1], 1.0)])
def test_only_the_default_warm_up_ends_with_the_first_epoch(run_main, options, reached):
    (seen,) = run_main(1, [0.1], "--lr", 0.032, "--multistep", 9, *options)  # 6 iterations per epoch
    assert seen[0]["lr_at_the_end"] == pytest.approx(0.032 * 2 / 32 * reached)


@pytest.mark.parametrize("name", ["ssd", "ssdlite"])
def test_weights_decay_but_biases_and_batch_norm_do_not(name):
    network = build_model(name, 4, pretrained_backbone=False)
    optimizer = make_optimizer(network)
    decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert {g["momentum"] for g in optimizer.param_groups} == {0.9}
    assert not any(group["nesterov"] for group in optimizer.param_groups)
    assert all((optimizer.state[p]["momentum_buffer"] == 0).all() for p in network.parameters())
    for module in network.modules():
        for kind, p in module.named_parameters(recurse=False):
            decay = isinstance(module, nn.Conv2d) and kind == "weight"
            assert decays.pop(id(p)) == (5e-4 if decay else 0)
    assert not decays


@pytest.mark.parametrize("name", ["ssd", "ssdlite"])
def test_the_backbone_alone_takes_backbone_lr_factor(name):
    network = build_model(name, 4, pretrained_backbone=False)
    optimizer = make_optimizer(network, backbone_lr_factor=0.03)
    factors = {id(p): g["lr_factor"] for g in optimizer.param_groups for p in g["params"]}
    backbone = network.feature_extractor if name == "ssd" else network.backbone
    assert {factors.pop(id(p)) for p in backbone.parameters()} == {0.03}
    heads = (network.additional_blocks, network.loc, network.conf)
    rest = [p for part in heads for p in part.parameters()]
    assert {factors.pop(id(p)) for p in rest} == {1.0} and not factors


@pytest.fixture
def imagenet_network(tmp_path, monkeypatch):
    """The network train.py starts SSDLite from by default; any download raises."""
    packed = SHARED / "weights" / f"{IMAGENET_FILE}.xz"
    if not packed.exists():
        pytest.skip("no ../shared/weights next to the repository")

    def refuse(url, *args, **kwargs):
        raise AssertionError(f"{url} would be fetched")

    monkeypatch.setattr("torch.hub.download_url_to_file", refuse)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    (tmp_path / "hub/checkpoints" / IMAGENET_FILE).write_bytes(lzma.decompress(packed.read_bytes()))
    monkeypatch.setattr(sys, "argv", ["train.py", "--model", "ssdlite"])
    return start_network(train.parse_args(), classes=["background", "cat", "dog"], resuming=False).eval()


@pytest.mark.parametrize(
    "options, model",
    [
        ([], "ssd"),
        (["--pretrained-model", "ssdlite.pth"], "ssdlite"),
        (["--pretrained-model", "ssdlite.pth", "--model", "ssd"], "ssd"),
    ],
)
def test_the_model_is_that_of_the_pretrained_one_unless_it_is_given(tmp_path, monkeypatch, options, model):
    monkeypatch.chdir(tmp_path)
    state = {"model": "ssdlite", "model_state_dict": {}, "classes": ["background"], "category_ids": []}
    torch.save(state, "ssdlite.pth")
    monkeypatch.setattr(sys, "argv", ["train.py", *options])
    assert train.parse_args().model == model


@torch.inference_mode()
def test_training_starts_from_imagenets_features(imagenet_network, tmp_path):
    files = sorted((SHARED / "data/coco_real/val2017").glob("*.jpg"))[:10]
    assert len(files) == 10
    classifier = mobilenet_v2().eval()  # torchvision's own network, filled from the file itself
    classifier.load_state_dict(torch.load(tmp_path / "hub/checkpoints" / IMAGENET_FILE, weights_only=True))
    layers = classifier.features
    for file in files:
        image = to_tensor(resize(read_image(file), 300))
        image = normalize(image, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))[None]
        expansion = layers[14].conv[0](layers[:14](image))
        first, last = imagenet_network.backbone(image)
        assert torch.equal(first, expansion) and torch.equal(last, layers(image))
        assert last.std() > 0.1  # 6e-9 in an untrained network


def spied_main(rank, world_size, port, options, aps, file):
    """Run train.main, whose epochs score the metrics of `aps`; save what was handed on."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if world_size > 1:
        join(rank, world_size, port)
    torch.set_num_threads(1)
    seen = []
    results = iter(aps)

    def train_steps(run, loader, network, criterion, schedule, amp):
        for buffer in network.buffers():  # as if this process had seen images of its own
            buffer.fill_(distributed.rank() + 1)
        ids = [image_id for batch in loader for image_id in batch[-1].tolist()]
        seen.append({"ids": ids, "ddp": isinstance(network, DistributedDataParallel)})
        seen[-1] |= {"amp": amp, "lr": schedule(1, 0), "epoch": run.epoch, "first": run.samples_seen}
        seen[-1]["lr_at_the_end"] = schedule(0, len(loader) - 1)
        seen[-1] |= {"zoom_out": loader.dataset.zoom_out, "best_ap": run.best_ap}
        return []

    def detector(network, name, classes, category_ids, device, amp):
        seen[-1]["buffers"] = {float(buffer.max()) for buffer in network.buffers()}
        seen[-1]["detector_amp"] = amp
        seen[-1]["frozen"] = [name for name, p in network.named_parameters() if not p.requires_grad]

    def evaluate(detector, loader, ground_truth, nms_threshold):
        seen[-1]["val_ids"] = [image_id for batch in loader for image_id in batch[1].tolist()]
        seen[-1]["nms_threshold"] = nms_threshold
        return dict.fromkeys(METRICS, next(results)), {}

    train.train_steps, train.Detector, train.evaluate = train_steps, detector, evaluate
    train.write_evaluation = lambda *_: None
    sys.argv = ["train.py", *options]
    with open(file.format(rank=rank), "w") as output, contextlib.redirect_stdout(output):
        train.main()
    torch.save(seen, f"{output.name}.pt")


@pytest.fixture
def run_main(shapes_folder, tmp_path):
    """Function that runs main in `processes`, which print to tmp_path/RANK; returns [epoch] by process."""

    def run(processes, aps, *options):
        options = [*options, "--data-path", shapes_folder, "--save-folder", tmp_path]
        options += ["--model", "ssdlite", "--no-pretrained-backbone", "--batch-size", 2]
        options += ["--num-workers", 0, "--epochs", len(aps), "--log-path", tmp_path / "log"]
        file = str(tmp_path / "{rank}")
        given = processes, free_port(), list(map(str, options)), aps, file
        in_processes(spied_main, processes, *given)
        return [torch.load(tmp_path / f"{rank}.pt") for rank in range(processes)]

    return run


def test_main_hands_on_its_options_and_keeps_the_best(run_main, tmp_path):
    options = ["--amp", "--zoom-out", "--lr", "0.032", "--multistep", "1", "--nms-threshold", "0.4"]
    (seen,) = run_main(1, [0.1, 0.3, 0.2], *options)
    assert [epoch["epoch"] for epoch in seen] == [0, 1, 2]
    for epoch in seen:
        assert epoch["amp"] and epoch["detector_amp"] and epoch["zoom_out"] and not epoch["ddp"]
        assert not epoch["frozen"]
        assert epoch["nms_threshold"] == 0.4 and epoch["first"] == 0
        assert epoch["lr"] == pytest.approx(0.032 * 2 / 32 / 10)  # second epoch, batches of 2
        assert sorted(epoch["ids"]) == sorted(seen[0]["ids"]) and len(set(epoch["ids"])) == 12
        assert len(set(epoch["val_ids"])) == len(epoch["val_ids"]) == 6
    assert seen[0]["ids"] != seen[1]["ids"]  # a new shuffle
    for end, finished in ("", 3), ("_best", 2):
        state = torch.load(tmp_path / f"ssdlite{end}.pth", weights_only=True)
        assert (state["epoch"], state["best_map"]) == (finished, 0.3)
        assert state["samples_seen"] == 0


def test_main_freezes_the_first_layers_of_a_checkpoint(run_main):
    ((epoch,),) = run_main(1, [0.1], "--freeze", "--pretrained-model", SHAPES)
    assert "backbone.to_stride_16.0.0.weight" in epoch["frozen"]
    assert not any(name.startswith(("loc", "conf", "backbone.to_stride_32")) for name in epoch["frozen"])


@pytest.mark.parametrize(
    "options, factor", [([], 1), (["--freeze"], 0.1), (["--freeze", "--backbone-lr-factor", "0.3"], 0.3)]
)
def test_what_is_not_frozen_of_the_backbone_learns_at_a_tenth(monkeypatch, options, factor):
    monkeypatch.setattr("sys.argv", ["train.py", *options])
    assert train.parse_args().backbone_lr_factor == factor


def test_the_option_of_torch_distributed_launch_is_taken(monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py", "--local-rank=1"])
    assert not hasattr(train.parse_args(), "local_rank")  # LOCAL_RANK is used; resuming does not compare it


@pytest.mark.parametrize(
    "options, error",
    [
        ("--freeze --no-pretrained-backbone", "random weights"),
        ("--device mps --amp", "leave it out"),
        ("--device mps:0 --amp", "leave it out"),
    ],
)
def test_options_that_do_not_go_together(monkeypatch, capsys, options, error):
    monkeypatch.setattr("sys.argv", ["train.py", *options.split()])
    with pytest.raises(SystemExit):
        train.parse_args()
    assert error in capsys.readouterr().err


def test_a_validation_set_without_a_box_keeps_the_latest_as_best(run_main, tmp_path):
    run_main(1, [-1.0, -1.0])  # what pycocotools gives where there is nothing to find
    said = (tmp_path / "0").read_text()
    assert "nothing to measure" in said and "no mAP measured" in said and "-1.000" not in said
    assert torch.load(tmp_path / "ssdlite_best.pth", weights_only=True)["epoch"] == 2


class OneCup:
    """A validation set of one image, on which there is one cup, the only category."""

    category_ids = [44]
    size = 300

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return np.zeros((300, 300, 3), np.uint8), np.int64(7), np.array([600, 900], np.float32)

    def objects(self, index):
        return np.array([[0.2, 0.2, 0.8, 0.8]], np.float32), np.array([1])


def test_logged_images_have_what_was_found_and_a_smaller_sets_ground_truth():
    drawn = []
    log = SimpleNamespace(add_image=lambda tag, image, *_, **__: drawn.append(image))
    boxes = torch.tensor([[120.0, 180, 480, 720], [0, 0, 600, 900]])  # in pixels of the file, 600 x 900
    found = {"boxes": boxes, "labels": torch.tensor([2, 1]), "scores": torch.tensor([0.9, 0.2])}
    run = SimpleNamespace(classes=["background", "cat", "dog", "cup"], category_ids=[2, 7, 44])
    write_images(log, {7: found}, OneCup(), run, 0)
    for left, label in ((0, 2), (300, 3)):  # found, and to its right the ground truth, whose only category is the third
        edge = drawn[0][61:240, left + 240]  # the right edge of the box
        assert (edge == class_color(label)).all(axis=1).mean() > 0.9
    assert not (drawn[0] == class_color(1)).all(axis=2).any()  # scores too little


def test_two_processes_share_gradients_images_and_buffers(run_main):
    zero, one = run_main(2, [0.1, 0.2])
    for epoch, other in zip(zero, one, strict=True):
        assert epoch["ddp"] and other["ddp"]
        assert not (epoch["amp"] or epoch["detector_amp"] or epoch["zoom_out"]) and epoch["nms_threshold"] == 0.5
        assert len({*epoch["ids"], *other["ids"]}) == 12 and len(epoch["ids"]) == 6
        assert not set(epoch["ids"]) & set(other["ids"])
        assert not set(epoch["val_ids"]) & set(other["val_ids"])
        assert len(epoch["val_ids"] + other["val_ids"]) == 6
        assert epoch["buffers"] == other["buffers"] == {1.0}  # rank 0's
        assert epoch["best_ap"] == other["best_ap"] == (0.1 if epoch["epoch"] else -1)  # any process may have to save
        assert epoch["lr"] == pytest.approx(2.6e-3 * 2 * 2 / 32 / 10)  # the second of two epochs
