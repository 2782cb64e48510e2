"""What only a GPU can show; skipped without one. Not run yet: none was at hand.

python -m pytest -s tests/test_gpu.py
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from demo.shapes import make_dataset
from src.boxes import Encoder, make_default_boxes
from src.detector import Detector
from src.engine import train_one_epoch
from src.loss import MultiBoxLoss
from src.model import build_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
ROOT = Path(__file__).resolve().parents[1]
MODELS = ("ssd", "ssdlite")


def pictures(count):
    return torch.randint(0, 256, (count, 300, 300, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def batch(name, size=8):
    """Pictures, targets of one object each, and image ids, as the loader hands them over."""
    encoder = Encoder(make_default_boxes(name))
    loc_targets, cls_targets = encoder.encode(torch.tensor([[0.2, 0.3, 0.6, 0.8]]), torch.tensor([1]))
    targets = loc_targets.expand(size, -1, -1), cls_targets.expand(size, -1)
    return pictures(size), *targets, torch.arange(size)


def network_of(name, num_classes=4):
    torch.manual_seed(0)
    network = build_model(name, num_classes, pretrained_backbone=False)
    return network.cuda().to(memory_format=torch.channels_last)


def optimizer_of(network):
    """As train.py makes it."""
    optimizer = torch.optim.SGD(network.parameters(), 1e-3, momentum=0.9, fused=True)
    for p in network.parameters():
        optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return optimizer


def steps(network, name, scaler, count, amp):
    """Losses of `count` training steps."""
    optimizer = optimizer_of(network)
    loader = [batch(name)] * count
    done = train_one_epoch(network, loader, MultiBoxLoss(), optimizer, scaler, 0, 0, lambda *_: 1e-3, amp)
    return [figures["Loss"] for _, figures in done if figures]


@pytest.mark.parametrize("name", MODELS)
def test_the_scaler_survives_a_step_that_overflows(name):
    network = network_of(name)
    before = [p.detach().clone() for p in network.parameters()]
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**40)  # float16 ends at 2 ** 16
    steps(network, name, scaler, 1, amp=True)
    assert scaler.get_scale() < 2.0**40
    for p, old in zip(network.parameters(), before, strict=True):
        assert_close(p.detach(), old, rtol=0, atol=0)  # the step was left out
    losses = steps(network, name, scaler, 60, amp=True)
    assert scaler.get_scale() < 2.0**25
    assert losses[-1] < losses[0]
    assert all(p.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_a_gpu_finds_what_a_cpu_finds(monkeypatch, name):
    # TF32 would round to 10 bits, on purpose; here the code is compared, not the rounding.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    network = network_of(name)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():  # batch norm's statistics, so that eval mode has normal outputs
        network.train()(torch.randn(8, 3, 300, 300, device="cuda"))
    classes, ids = ["background", "a", "b", "c"], [1, 2, 3]
    on_gpu, on_cpu = (Detector(network, name, classes, ids, kind) for kind in ("cuda", "cpu"))
    images = torch.randn(2, 3, 300, 300)
    with torch.inference_mode():
        for here, there in zip(on_gpu.model(images.cuda()), on_cpu.model(images), strict=True):
            assert there.std() > 0.01  # not one constant compared with another
            assert_close(here.cpu(), there, atol=1e-3, rtol=1e-3)
    # The same outputs decode to the same detections.
    D = len(make_default_boxes(name))
    loc, cls_logits = torch.randn(2, D, 4), torch.zeros(2, D, 4)
    cls_logits[:, :, 0] = 20.0
    for b in range(2):  # scores so far apart that rounding swaps none
        chosen, scores = torch.randperm(D)[:150], torch.linspace(0.1, 0.9, 150)
        cls_logits[b, chosen, 1 + chosen % 3] = 20 + scores.logit()
    gpu = on_gpu.encoder.decode(loc.cuda(), cls_logits.cuda())
    cpu = on_cpu.encoder.decode(loc, cls_logits)
    for here, there in zip(gpu, cpu, strict=True):
        assert len(there["scores"]) > 50
        for key in ("boxes", "labels", "scores"):
            assert_close(here[key].cpu(), there[key], atol=1e-3, rtol=0)
    found = Detector(network, name, classes, ids, "cuda", amp=True)(list(pictures(2).numpy()))
    assert all(one["boxes"].isfinite().all() and len(one["boxes"]) <= 200 for one in found)


def test_mixed_precision_takes_less_memory():
    peaks = {}
    for amp in (False, True):
        network = network_of("ssd", num_classes=81)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        steps(network, "ssd", torch.amp.GradScaler("cuda", enabled=amp), 3, amp)
        peaks[amp] = torch.cuda.max_memory_allocated() / 2**20
        del network
    print(f"ssd, batch 8: {peaks[False]:.0f} MiB in float32, {peaks[True]:.0f} with --amp")
    assert peaks[True] < 0.8 * peaks[False]


def train(data, folder, *options, processes=1):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [*launcher, "train.py", "--data-path", data, "--model", "ssdlite", "--amp"]
    command += ["--no-pretrained-backbone", "--batch-size", 4, "--num-workers", 2]
    command += ["--save-folder", folder, "--log-path", folder / "log", *options]
    command = [sys.executable, *map(str, command)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_all_gpus_train_and_resume(tmp_path):
    gpus = torch.cuda.device_count()  # from two on, NCCL sums their gradients
    make_dataset(tmp_path / "data", train=8 * gpus, val=2 * gpus + 1)
    train(tmp_path / "data", tmp_path, "--epochs", 1, processes=gpus)
    said = train(tmp_path / "data", tmp_path, "--epochs", 2, processes=gpus)
    assert "resuming from" in said and "epoch 2" in said
    state = torch.load(tmp_path / "ssdlite.pth", weights_only=True)
    assert (state["epoch"], state["samples_seen"]) == (2, 0)
    assert state["scaler"]["scale"] > 0
    assert all(values.isfinite().all() for values in state["model_state_dict"].values())
