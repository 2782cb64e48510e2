"""src.distributed in real gloo processes, and what DistributedDataParallel makes of a batch."""

import json
import os
import socket

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from pycocotools.coco import COCO
from torch.nn.parallel import DistributedDataParallel

from src import distributed
from src.boxes import Encoder, make_default_boxes
from src.engine import evaluate
from src.loss import MultiBoxLoss
from src.model import build_model


def shared_buffer(value):
    """Rank 0's buffer, as this process has it after sharing."""
    network = torch.nn.BatchNorm2d(1)
    network.running_mean.fill_(value)
    distributed.share_buffers(network)
    return network.running_mean.item()


def test_a_lone_process_needs_no_set_up(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    distributed.set_up()
    assert not torch.distributed.is_initialized()
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    assert distributed.total([1.5, -2.0]) == [1.5, -2.0]
    assert distributed.gather("mine") == ["mine"]
    assert shared_buffer(7) == 7
    distributed.tear_down()


def start(rank, world_size, port, jobs, folder):
    """What torchrun does for a process: its environment, then the program."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": ""}
    torch.set_num_threads(1)
    assert distributed.set_up() == torch.device("cpu")
    torch.save([job() for job in jobs], folder / f"{rank}.pt")
    distributed.tear_down()
    assert not torch.distributed.is_initialized()


def in_processes(world_size, folder, *jobs):
    """What each of `jobs` returned in each of `world_size` processes, a list for each job."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(start, (world_size, port, jobs, folder), nprocs=world_size)
    answers = [torch.load(folder / f"{r}.pt", weights_only=False) for r in range(world_size)]
    return list(zip(*answers, strict=True))


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two processes answer; started once, as this takes seconds."""
    jobs = use_everything, gradients, evaluate_share
    answers = in_processes(2, tmp_path_factory.mktemp("two"), *jobs)
    return dict(zip(("use_everything", "gradients", "evaluate_share"), answers, strict=True))


def use_everything():
    rank = distributed.rank()
    mine = {"rank": rank, "rows": np.full((rank, 7), rank + 0.5)}  # rank 0's share is empty
    return {
        "rank": rank,
        "world_size": distributed.world_size(),
        "total": distributed.total([10.0**rank, 0.1 * rank, -1e-9]),
        "gather": distributed.gather(mine),
        "buffer": shared_buffer(rank + 5),
    }


def check_answers(answers, sums):
    assert [answer["rank"] for answer in answers] == list(range(len(answers)))
    for answer in answers:
        assert answer["world_size"] == len(answers)
        assert answer["total"] == pytest.approx(sums, rel=1e-12)  # float64
        assert answer["buffer"] == 5
    gathered, *others = [answer["gather"] for answer in answers]
    assert others == [None] * (len(answers) - 1)
    assert [one["rank"] for one in gathered] == list(range(len(answers)))
    assert [one["rows"].shape for one in gathered] == [(r, 7) for r in range(len(answers))]


def test_two_processes_total_gather_and_buffers(two):
    check_answers(two["use_everything"], [11, 0.1, -2e-9])


def test_three_processes_total_gather_and_buffers(tmp_path):
    (answers,) = in_processes(3, tmp_path, use_everything)
    check_answers(answers, [111, 0.3, -3e-9])


# Two processes with 4 pictures each compute what one computes with 8


def eight_samples():
    """A batch with 0 to 3 objects a picture."""
    generator, encoder = torch.Generator().manual_seed(1), Encoder(make_default_boxes("ssdlite"))
    images = torch.randn(8, 3, 300, 300, generator=generator)
    targets = []
    for i in range(8):
        corners = torch.rand(i % 4, 2, 2, generator=generator).sort(dim=1).values
        targets.append(encoder.encode(corners.flatten(1), torch.arange(1, i % 4 + 1)))
    return images, *map(torch.stack, zip(*targets, strict=True))


def gradients():
    """Loss and gradients of this process's share of the eight samples."""
    torch.manual_seed(0)
    network = build_model("ssdlite", 4, pretrained_backbone=False).eval().double()
    world_size = distributed.world_size()
    model = DistributedDataParallel(network) if world_size > 1 else network
    images, loc_targets, cls_targets = (
        part[distributed.rank() :: world_size] for part in eight_samples()
    )
    losses = MultiBoxLoss()(*model(images.double()), loc_targets, cls_targets)
    sum(losses).backward()
    shared = distributed.total([sum(losses).item()])[0] / world_size
    return shared, {name: p.grad for name, p in network.named_parameters()}


def test_two_processes_have_the_gradient_of_one_with_the_double_batch(two):
    loss, alone = gradients()
    for shared, grads in two["gradients"]:
        assert shared == pytest.approx(loss, rel=1e-5)
        assert grads.keys() == alone.keys()
        for name, gradient in alone.items():
            assert grads[name] is not None, name  # an unused one would hang DDP
            scale = gradient.abs().max().clamp(min=1)
            torch.testing.assert_close(
                grads[name] / scale, gradient / scale, atol=1e-5, rtol=0, msg=name
            )
    assert max(gradient.abs().max() for gradient in alone.values()) > 0.1


# Evaluation


class Drawn:
    """A detector that takes its answer from the pixels: reproducible, and not always right."""

    category_ids = [3, 21]

    def detect_resized(self, images, sizes, **thresholds):
        out = []
        for image in images:
            width, kind = image[0, 0, :2].tolist()
            boxes = torch.tensor([[10.0, 10, 10 + width, 60]] * (kind % 3))
            labels = torch.full((len(boxes),), 1 + kind % 2)
            scores = torch.linspace(0.9, 0.3, len(boxes))
            out.append({"boxes": boxes.reshape(-1, 4), "labels": labels, "scores": scores})
        return out


def seven_pictures():
    """Truth and pictures; an odd number, so that two processes have unequal shares."""
    truth, images, annotations = COCO(), [], []
    pixels = torch.zeros(7, 300, 300, 3, dtype=torch.uint8)
    for i in range(7):
        images.append({"id": 50 - i, "width": 300, "height": 300})
        pixels[i, 0, 0, :2] = torch.tensor([40 + 5 * i, i])
        entry = {"id": i + 1, "image_id": 50 - i, "category_id": (3, 21)[i % 2], "iscrowd": 0}
        annotations.append(entry | {"bbox": [10, 10, 50, 50], "area": 2500})
    truth.dataset = {"images": images, "annotations": annotations}
    truth.dataset["categories"] = [{"id": 3, "name": "a"}, {"id": 21, "name": "b"}]
    truth.createIndex()
    return truth, pixels, torch.arange(50, 43, -1)


def evaluate_share():
    truth, pixels, ids = seven_pictures()
    own = slice(distributed.rank(), None, distributed.world_size())
    loader = [
        (p[None], i[None], torch.ones(1, 2)) for p, i in zip(pixels[own], ids[own], strict=True)
    ]
    return evaluate(Drawn(), loader, truth if distributed.rank() == 0 else None)


def test_evaluation_counts_every_picture_once_in_two_processes(two):
    metrics, detections = evaluate_share()
    (shared, gathered), other = two["evaluate_share"]
    assert other is None
    assert 0 < metrics["AP"] < 1 and json.dumps(shared) == json.dumps(metrics)
    np.testing.assert_array_equal(gathered, detections)
    assert len(detections) == sum(i % 3 for i in range(7))
