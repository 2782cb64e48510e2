"""src.distributed in real gloo processes, and what DistributedDataParallel makes of a batch."""

import fcntl
import multiprocessing
import os
import socket
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from runs import free_port, in_processes, join, same, start_processes
from samples import as_detections

from src import distributed, stopping
from src.boxes import Encoder, make_default_boxes
from src.detector import Detector
from src.engine import METRICS, coco_results, compute_metrics, evaluate, run_coco_eval
from src.loss import MultiBoxLoss
from src.model import build_model
from src.usage import UserError


@pytest.mark.parametrize(
    "environment, named",
    [
        ({"RANK": "0"}, "WORLD_SIZE is not set, MASTER_ADDR is not set, MASTER_PORT is not set"),
        ({"RANK": "0", "WORLD_SIZE": "1"}, "MASTER_ADDR is not set"),
        ({"RANK": "", "WORLD_SIZE": "1"}, "RANK is not set"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK is 'one'"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK is 'x'"),
        ({"LOCAL_RANK": ""}, "LOCAL_RANK is ''"),
        ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}, "RANK is 2, WORLD_SIZE 2"),
        ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "{used}"}, "MASTER_PORT {used}"),
        ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "70000"}, "MASTER_PORT 70000"),
    ],
)
def test_an_environment_that_torchrun_did_not_make_is_a_users_error(monkeypatch, environment, named):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with socket.socket() as other:  # has the port
        other.bind(("0.0.0.0", 0))
        other.listen()
        used = other.getsockname()[1]
        for name, value in environment.items():
            monkeypatch.setenv(name, value.format(used=used))
        with pytest.raises(UserError) as error:
            distributed.set_up()
    assert named.format(used=used) in str(error.value) and "\n" not in str(error.value)
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    "name, error",
    [
        ("gpu", "--device gpu: unknown; give cpu, cuda, cuda:1 for the second GPU, or mps"),
        ("meta", "--device meta: unknown"),
        ("cpu:1", "--device cpu:1: unknown"),
        ("cuda:300", "--device cuda:300: unknown"),  # to torch it is cuda:44
        ("cuda:01", "--device cuda:01: unknown"),
        ("cuda:-1", "--device cuda:-1: unknown"),
        ("cuda", "--device cuda: CUDA sees 0 GPUs, counted from 0; leave --device out"),
        ("cuda:3", "--device cuda:3: CUDA sees 0 GPUs"),
        ("mps", "--device mps: none here"),
    ],
)
def test_a_device_that_is_not_here_is_a_users_error(monkeypatch, name, error):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError) as raised:
        distributed.choose_device(name)
    assert str(raised.value).startswith(error) and "\n" not in str(raised.value)


def test_the_device_is_the_gpu_unless_another_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert distributed.choose_device() == distributed.choose_device("cpu") == torch.device("cpu")
    assert (
        distributed.choose_device("cpu:0") == distributed.choose_device(torch.device("cpu", 0)) == torch.device("cpu:0")
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert distributed.choose_device() == distributed.choose_device("cuda") == torch.device("cuda")
    assert distributed.choose_device(None, 0) == distributed.choose_device("cuda", 0) == torch.device("cuda:0")
    assert distributed.choose_device(None, 1) == distributed.choose_device("cuda", 1) == torch.device("cuda:1")
    assert distributed.choose_device("cuda:1") == torch.device("cuda:1")
    assert distributed.choose_device("cpu", 1) == torch.device("cpu")
    with pytest.raises(UserError, match="2 GPUs here: use no more processes"):
        distributed.choose_device(None, 2)


@pytest.mark.parametrize("name", ["cuda:1", "mps"])
def test_processes_do_not_share_a_gpu(monkeypatch, name):
    monkeypatch.setattr(distributed, "choose_device", lambda *_: torch.device("cpu"))
    for key, value in {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(key, str(value))
    with pytest.raises(UserError, match=f"--device {name}: several processes cannot share it"):
        distributed.set_up(name)


def shared_buffer(value):
    """Rank 0's buffer, as this process has it after sharing."""
    network = torch.nn.BatchNorm2d(1)
    network.running_mean.fill_(value)
    distributed.broadcast_buffers(network)
    return network.running_mean.item()


def test_a_lone_process_needs_no_set_up(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    distributed.set_up()
    assert not torch.distributed.is_initialized()
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    assert distributed.all_reduce([1.5, -2.0]) == [1.5, -2.0]
    assert distributed.all_gather("mine") == ["mine"]
    assert shared_buffer(7) == 7
    distributed.tear_down()


def start(rank, world_size, port, jobs, folder):
    """What torchrun does for a process without a GPU: its environment, then the program."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    join(rank, world_size, port)
    torch.set_num_threads(1)
    assert distributed.set_up() == torch.device("cpu")
    os.chdir(folder)
    torch.save([job() for job in jobs], f"{rank}.pt")
    distributed.tear_down()
    assert not torch.distributed.is_initialized()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """{name of job: what it returned in each of two processes}; started once, as this takes seconds."""
    jobs = use_everything, out_of_memory, locked_checkpoint, gradients, traffic, evaluate_share, evaluate_categories
    jobs += (enter_loop,)  # last, as it takes signals
    folder = tmp_path_factory.mktemp("answers")
    (folder / "ssdlite.lock").write_text("process 7 on the moon")
    with open(folder / "ssdlite.lock", "r+") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        in_processes(start, 2, 2, free_port(), jobs, folder)
    answers = [torch.load(folder / f"{r}.pt", weights_only=False) for r in range(2)]
    return {job.__name__: by_rank for job, *by_rank in zip(jobs, *answers, strict=True)}


def use_everything():
    rank = distributed.rank()
    mine = {"rank": rank, "rows": np.full((rank, 7), rank + 0.5)}  # rank 0's share is empty
    return {
        "rank": rank,
        "world_size": distributed.world_size(),
        "all_reduce": distributed.all_reduce([10.0**rank, 0.1 * rank, -1e-9]),
        "all_gather": distributed.all_gather(mine),
        "buffer": shared_buffer(rank + 5),
    }


def check_answers(answers, sums):
    assert [answer["rank"] for answer in answers] == list(range(len(answers)))
    for answer in answers:
        assert answer["world_size"] == len(answers)
        assert answer["all_reduce"] == pytest.approx(sums, rel=1e-12)  # float64
        assert answer["buffer"] == 5
    for gathered in [answer["all_gather"] for answer in answers]:
        assert [one["rank"] for one in gathered] == list(range(len(answers)))
        assert [one["rows"].shape for one in gathered] == [(r, 7) for r in range(len(answers))]


def test_two_processes_all_reduce_all_gather_and_buffers(two):
    check_answers(two["use_everything"], [11, 0.1, -2e-9])


def locked_checkpoint():
    """How stopping.lock_checkpoint ends where another process has the lock."""
    try:
        stopping.lock_checkpoint(Path("ssdlite.pth"))
    except (UserError, SystemExit) as end:
        return type(end), str(end)


def test_a_folder_in_use_ends_every_process_and_one_says_why(two):
    (kind, message), other = two["locked_checkpoint"]
    assert kind is UserError and "in use by process 7 on the moon" in message
    assert other == (SystemExit, "2")


def enter_loop():
    """When this process had removed what killed saves left, and when it could train."""
    stoppable = stopping.Stoppable(Path("ssd.pth"))
    times = []
    with pytest.MonkeyPatch.context() as patch:
        slow = lambda *_: (time.sleep(0.5), times.append(time.monotonic()))  # noqa: E731
        patch.setattr(stopping, "remove_leftovers", slow)
        with stoppable.saving(SimpleNamespace(options={})):
            return [*times, time.monotonic()]


def test_no_process_can_save_before_leftovers_are_removed(two):
    (removed, first), (second,) = two["enter_loop"]
    assert removed < first and removed < second


# A process that does not come


SECONDS = 12  # what a process waits here at most


def wait_in_vain(rank, port, together, how, lost, folder):
    """A process waits for `lost`, which has gone or does not come; note what it says, and after how long."""
    join(rank, 2, port)
    distributed.TIMEOUT = timedelta(seconds=SECONDS)
    open_store, sleep = distributed.open_store, time.sleep
    distributed.open_store = lambda timeout: open_store(min(timeout, distributed.TIMEOUT / 2))
    distributed.time = SimpleNamespace(sleep=lambda seconds: sleep(seconds / 10))
    together.wait()  # on a busy machine one has imported torch long before the other
    distributed.set_up()
    together.wait()  # or one has gone, with the store, before the other has found it
    if rank == lost:
        time.sleep(60 if how in ("barrier", "all_reduce") else 0)
        os._exit(0)
    begun = time.monotonic()
    try:
        with distributed.report_lost_ranks():
            distributed.barrier() if how == "barrier" else distributed.all_reduce([1.0])
    except UserError as error:
        (folder / how).write_text(f"{time.monotonic() - begun} {error}")
    finally:
        os._exit(0)


@pytest.fixture(scope="module")
def waited(tmp_path_factory):
    """{how: (seconds that a process waited for the other, what it said)}; all pairs wait at the same time."""
    folder = tmp_path_factory.mktemp("waited")
    pairs = {}
    context = multiprocessing.get_context("forkserver")
    for how, lost in {"gone": 1, "barrier": 1, "all_reduce": 1, "store": 0}.items():
        given = free_port(), context.Barrier(2), how, lost, folder
        pairs[how] = start_processes(wait_in_vain, 2, *given).processes, 1 - lost, given
    for processes, waiting, _ in pairs.values():
        processes[waiting].join(120)
        for process in processes:
            process.kill()
    outcomes = {how: (folder / how).read_text().split(" ", 1) for how in pairs}
    return {how: (float(seconds), message) for how, (seconds, message) in outcomes.items()}


@pytest.mark.parametrize(
    "how, least, most", [("gone", 0, SECONDS), ("barrier", SECONDS / 2, SECONDS), ("all_reduce", SECONDS, 3 * SECONDS)]
)
def test_a_process_that_does_not_come_is_named_in_time(waited, how, least, most):
    seconds, message = waited[how]
    assert least <= seconds < most and message.startswith("no answer from rank 1 ("), message


def test_a_lost_machine_with_the_store_is_named_by_its_address(waited):
    _, message = waited["store"]  # rank 0 keeps the store here
    assert message.startswith("no answer from 127.0.0.1, where torchrun keeps its store"), message


def test_restarted_processes_do_not_see_the_addresses_of_the_dead(monkeypatch):
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}.items():
        monkeypatch.setenv(name, str(value))
    first, rank, world_size = distributed.open_store(timedelta(seconds=20))
    first.set("address", "of a dead process")
    again, *_ = distributed.open_store(timedelta(seconds=20))  # the same attempt
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")  # as torchrun tells the second
    restarted, *_ = distributed.open_store(timedelta(seconds=20))
    assert again.check(["address"]) and not restarted.check(["address"]) and (rank, world_size) == (0, 1)


def out_of_memory():
    try:
        with distributed.report_lost_ranks():
            raise RuntimeError("CUDA out of memory")
    except RuntimeError as error:
        return str(error)


def test_other_errors_pass_as_they_are(two):
    assert two["out_of_memory"] == ["CUDA out of memory"] * 2


# Two processes with 2 images each compute what one computes with 4


def four_samples():
    """A batch with 0 to 3 objects an image."""
    generator, encoder = torch.Generator().manual_seed(1), Encoder(make_default_boxes("ssdlite"))
    images = torch.randn(4, 3, 300, 300, generator=generator)
    targets = []
    for i in range(4):
        corners = torch.rand(i, 2, 2, generator=generator).sort(dim=1).values
        targets.append(encoder.encode(corners.flatten(1), torch.arange(1, i + 1)))
    return images, *map(torch.stack, zip(*targets, strict=True))


def gradients(device="cpu"):
    """Loss and gradients of this process's share of the four samples."""
    torch.manual_seed(0)
    network = build_model("ssdlite", 4, pretrained_backbone=False).eval().double().to(device)
    world_size = distributed.world_size()
    model = distributed.maybe_ddp(network)
    images, loc_targets, cls_targets = (part[distributed.rank() :: world_size].to(device) for part in four_samples())
    losses = MultiBoxLoss()(*model(images.double()), loc_targets, cls_targets)
    sum(losses).backward()
    shared = distributed.all_reduce([sum(losses).item()])[0] / world_size
    return shared, {name: p.grad.cpu() for name, p in network.named_parameters()}  # None would hang DDP


def test_two_processes_have_the_gradient_of_one_with_the_double_batch(two):
    check_gradients(two["gradients"], *gradients())


def check_gradients(answers, loss, alone):
    for shared, grads in answers:
        assert shared == pytest.approx(loss, rel=1e-5)
        assert grads.keys() == alone.keys()
        for name, gradient in alone.items():
            scale = gradient.abs().max().clamp(min=1)
            torch.testing.assert_close(grads[name] / scale, gradient / scale, atol=1e-5, rtol=0, msg=name)
    assert max(gradient.abs().max() for gradient in alone.values()) > 0.1


def traffic():
    """Collectives of a training step, and what the processes then have in common."""
    torch.manual_seed(distributed.rank())
    layers = torch.nn.Conv2d(3, 4, 3, bias=False), torch.nn.BatchNorm2d(4)
    model = distributed.maybe_ddp(torch.nn.Sequential(*layers)).train()
    at_start = [values.clone() for values in model.module.state_dict().values()]
    for _ in range(3):  # DDP arranges its buckets in the first two
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            model(torch.randn(2, 3, 8, 8)).square().sum().backward()
    names = [event.name for event in profiler.events() if event.name.startswith("gloo:")]
    mean = model.module[1].running_mean.clone()
    distributed.broadcast_buffers(model.module)
    return at_start, names, [p.grad for p in model.parameters()], mean, model.module[1].running_mean


def test_a_step_sends_gradients_alone_and_buffers_are_shared_when_asked_for(two):
    (start, names, grads, mean, shared), other = two["traffic"]
    assert names == other[1] == ["gloo:all_reduce"]
    assert all(map(torch.equal, start, other[0])) and all(map(torch.equal, grads, other[2]))
    assert not torch.equal(mean, other[3])  # of its own images
    assert torch.equal(shared, mean) and torch.equal(other[4], mean)  # rank 0's


# Evaluation


def seven_images():
    """COCO's ground truth and noise for pixels; seven, so that the processes have unequal shares."""
    ground_truth = COCO()
    images = [{"id": 50 - i, "width": 300, "height": 300} for i in range(7)]
    annotations = [
        {"id": i + 1, "image_id": 50 - i, "category_id": (3, 21)[i % 2], "iscrowd": 0}
        | {"bbox": [10 * i, 100, 90, 60], "area": 5400}
        for i in range(7)
    ]
    ground_truth.dataset = {"images": images, "annotations": annotations}
    ground_truth.dataset["categories"] = [{"id": 3, "name": "a"}, {"id": 21, "name": "b"}]
    ground_truth.createIndex()
    noise = torch.randint(0, 256, (7, 8, 8, 3), generator=torch.Generator().manual_seed(0))
    pixels = noise.repeat_interleave(38, dim=1).repeat_interleave(38, dim=2)[:, :300, :300]
    return ground_truth, pixels.to(torch.uint8), torch.arange(50, 43, -1)


def evaluate_share():
    """Metrics and detections of a network of random weights, as train.py shares the work."""
    torch.manual_seed(0)
    network = build_model("ssdlite", 3, pretrained_backbone=False)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    network.train()(torch.randn(4, 3, 300, 300))  # so that batch norm has these statistics
    with torch.no_grad():
        for name, values in network.named_parameters():
            if name.startswith(("loc.", "conf.")):
                values.mul_(0.3)  # outputs of a trained network's size
    detector = Detector(network, "ssdlite", ["background", "a", "b"], [3, 21], "cpu")
    ground_truth, pixels, ids = seven_images()
    own = slice(distributed.rank(), None, distributed.world_size())
    batches = zip(pixels[own].split(2), ids[own].split(2), strict=True)
    loader = [(p, i, torch.tensor([[300, 300]] * len(i))) for p, i in batches]
    return evaluate(detector, loader, ground_truth)


def test_evaluation_by_two_processes_finds_the_same(two):
    answers = two["evaluate_share"]
    metrics, detections = evaluate_share()
    for _, gathered in answers[1:]:
        assert same(dict(sorted(gathered.items())), dict(sorted(answers[0][1].items())))
    (shared, gathered), *others = answers
    assert all(metrics == shared for metrics, _ in others)  # every process knows them
    for name in ("per_class", "per_class_AP50"):
        assert shared.pop(name) == pytest.approx(metrics.pop(name), abs=1e-4)
    assert (
        shared.pop("best_F1").keys() == metrics.pop("best_F1").keys()
    )  # the rest: where two scores tie, either is best
    assert 0 < metrics["AP"] < 1 and shared == pytest.approx(metrics, abs=1e-4)
    scores = torch.cat([found["scores"] for found in detections.values()]).numpy()
    assert len(scores) > 500 and np.ptp(scores) > 0.1  # not one like the other
    assert sorted(gathered) == sorted(detections)
    for image_id, found in detections.items():
        assert torch.equal(gathered[image_id]["labels"], found["labels"])
        torch.testing.assert_close(gathered[image_id]["scores"], found["scores"], atol=1e-5, rtol=0)
        torch.testing.assert_close(gathered[image_id]["boxes"], found["boxes"], atol=1e-3, rtol=0)


def noisy_detections(categories):
    """COCO's ground truth of six images, and detections by image; the last of several categories has no object."""
    rng = np.random.default_rng(categories)
    ground_truth, objects = COCO(), max(1, categories - 1)
    boxes = np.concatenate([rng.uniform(0, 200, (60, 2)), rng.uniform(9, 150, (60, 2))], axis=1)
    annotations = [
        {"id": i + 1, "image_id": i % 6, "category_id": 10 + i * i % objects, "iscrowd": int(i % 20 == 7)}
        | {"bbox": box, "area": box[2] * box[3]}
        for i, box in enumerate(boxes.tolist())
    ]
    ground_truth.dataset = {
        "images": [{"id": i, "width": 400, "height": 400} for i in range(6)],
        "annotations": annotations,
        "categories": [{"id": 10 + i, "name": str(i)} for i in range(categories)],
    }
    ground_truth.createIndex()
    rows = [[a["image_id"], *a["bbox"], 0, a["category_id"]] for a in annotations for _ in range(3)]
    detections = np.array(rows) + 0.0
    detections[:, 1:5] += rng.normal(0, 6, (len(rows), 4))
    detections[:, 5] = rng.integers(1, 50, len(rows)) / 50  # with ties
    detections[::9, 6] = 10 + categories - 1
    return ground_truth, as_detections(detections, sorted(ground_truth.cats))


def evaluate_categories():
    """[(what pycocotools found, metrics)] for a category alone, which leaves a process idle, and for seven."""
    answers = []
    for categories in (1, 7):
        ground_truth, detections = noisy_detections(categories)
        coco_eval = run_coco_eval(ground_truth, detections, sorted(ground_truth.cats))
        arrays = [coco_eval.eval[name] for name in ("precision", "recall", "scores")]
        answers.append((arrays, compute_metrics(ground_truth, detections, sorted(ground_truth.cats))))
    return answers


def test_categories_evaluated_in_shares_give_pycocotools_metrics_bit_for_bit(two):
    answers = two["evaluate_categories"]
    for i, categories in enumerate((1, 7)):
        ground_truth, detections = noisy_detections(categories)
        oracle = COCOeval(
            ground_truth, ground_truth.loadRes(coco_results(detections, sorted(ground_truth.cats))), "bbox"
        )
        oracle.evaluate(), oracle.accumulate(), oracle.summarize()
        assert 0.1 < oracle.stats[0] < 0.9 and len(set(oracle.stats)) > 6
        for arrays, metrics in [by_rank[i] for by_rank in answers]:
            for name, array in zip(("precision", "recall", "scores"), arrays, strict=True):
                np.testing.assert_array_equal(array, oracle.eval[name])
            assert [metrics[name] for name in METRICS] == oracle.stats.tolist()
            assert metrics == compute_metrics(ground_truth, detections, sorted(ground_truth.cats))
