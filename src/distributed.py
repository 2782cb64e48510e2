"""The device, and the processes: rank, world size, set-up, all_reduce, all_gather."""

import contextlib
import os
import platform
import re
import time
from collections import Counter
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from src.usage import UserError

# How long a process waits for the others before it fails: a machine that loses its power or its
# network does not say so. It must be longer than anything that one process does while the others
# wait: saving, downloading ImageNet's weights, checking files on a slow disk.
TIMEOUT = timedelta(minutes=10)


def choose_device(name=None, local_rank=None):
    """The torch.device called `name`: "cpu", "cuda", "cuda:1" or "mps"; default: the CUDA GPU if there is one.

    "cuda" is GPU number `local_rank`, by default CUDA's current one. UserError if `name` is not a device, or not here.
    """
    name = str(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if not re.fullmatch("(cpu|mps)(:0)?|cuda(:(0|[1-9][0-9]?))?", name):  # to torch cuda:300 is cuda:44
        raise UserError(f"--device {name}: unknown; give cpu, cuda, cuda:1 for the second GPU, or mps")
    device = torch.device(name)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"--device {name}: none here; leave --device out")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if device.index is None and local_rank is not None and count:
            if local_rank >= count:
                raise UserError(f"{count} GPUs here: use no more processes")
            device = torch.device("cuda", local_rank)
        if (device.index or 0) >= count:
            raise UserError(f"--device {device}: CUDA sees {count} GPUs, counted from 0; leave --device out")
    return device


def amp_note(device, amp):
    """What to add to a line about the device where --amp slows things down."""
    if not amp or device.type != "cpu" or platform.machine() not in ("x86_64", "AMD64"):
        return ""
    has_bfloat16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)  # not in every version of torch
    if not has_bfloat16():
        return "; --amp is slow here: this CPU has no bfloat16 instructions"
    return ""


def set_up(device_name=None):
    """Join the processes that torchrun started, if it did; return this process's device."""
    check_environment()
    device = choose_device(device_name, int(os.environ.get("LOCAL_RANK", 0)))
    if "RANK" in os.environ and int(os.environ["WORLD_SIZE"]) > 1 and device_name not in (None, "cpu", "cpu:0", "cuda"):
        raise UserError(f"--device {device_name}: several processes cannot share it; give cuda, or one process")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        # gloo carries Python objects and flags, NCCL the gradients.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        try:
            store, rank, world_size = open_store(TIMEOUT)
        except (RuntimeError, ValueError, OverflowError) as error:
            address = f"MASTER_ADDR {os.environ['MASTER_ADDR']}, MASTER_PORT {os.environ['MASTER_PORT']}"
            raise UserError(f"{address}: no connection ({error}); choose another port, with --master-port") from error
        try:
            dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=TIMEOUT)
        except RuntimeError as error:
            if "connectFullMesh" not in str(error):
                raise
            # Where a machine's own name is 127.0.1.1 to it, gloo hands that address to the others.
            raise UserError(
                f"processes do not reach each other ({error}): on every machine set GLOO_SOCKET_IFNAME"
                " to the network interface that leads to the others, such as eth0"
            ) from error
    return device


def check_environment():
    """UserError if the environment holds only a part of what torchrun tells a process, or something else."""
    numbers = {name: os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")}
    wrong = [f"{name} is {value!r}" for name, value in numbers.items() if value is not None and not value.isdecimal()]
    if "RANK" in os.environ:
        needed = "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"
        wrong += [f"{name} is not set" for name in needed if not os.environ.get(name)]
        if not wrong and int(numbers["RANK"]) >= int(numbers["WORLD_SIZE"]):
            wrong = [f"RANK is {numbers['RANK']}, WORLD_SIZE {numbers['WORLD_SIZE']}"]
    if wrong:
        raise UserError(f"{', '.join(wrong)}: start several processes with torchrun; for one, unset RANK")


def open_store(timeout):
    """Connect to torchrun's key-value store; returns it, this process's rank and the world size."""
    store, rank, world_size = next(rendezvous("env://", timeout=timeout))
    # torchrun keeps its store when it restarts the processes (--max-restarts), and in it the
    # addresses of the dead ones: each attempt needs keys of its own. On several machines the agents'
    # counts differ; there TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 gives each attempt a store of its own.
    if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    return store, rank, world_size


@contextlib.contextmanager
def report_lost_ranks():
    """Turn the error of waiting in vain for other processes into a UserError that names their ranks, or machine."""
    try:
        yield
    except RuntimeError as error:
        if not (dist.is_initialized() and re.search("gloo|monitoredBarrier", str(error))):
            raise
        try:
            store, rank, world_size = open_store(timedelta(seconds=20))
            store.set(f"alive/{rank}", "")
            time.sleep(5)  # the others notice it, too
            lost = [str(other) for other in range(world_size) if not store.check([f"alive/{other}"])]
            missing = f"rank {', '.join(lost)}" if lost else ""
        except RuntimeError:  # its machine has gone
            missing = f"{os.environ['MASTER_ADDR']}, where torchrun keeps its store"
        if not missing:
            raise
        reason = str(error).split(". ")[0]
        raise UserError(
            f"no answer from {missing} ({reason}): see its own message, or look at its machine;"
            " the same command resumes from the last checkpoint"
        ) from error


def tear_down():
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        # gloo's threads may still hold tensors of the last sum, and wait for Python to free them
        # while Python waits for the threads (seen in torch 2.6): a barrier holds none.
        dist.barrier()
        dist.destroy_process_group()


def rank():
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main_process():
    """True for the process that prints and writes files."""
    return rank() == 0


def print_rank0(text):
    """Print from the main process only."""
    if is_main_process():
        print(text, flush=True)


def describe_devices(device):
    """What all processes run on, in words: "8 x NVIDIA H100", "1 x CPU (16 threads)".

    device is this process's; collective.
    """
    name = f"CPU ({torch.get_num_threads()} threads)" if device.type == "cpu" else device.type
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    counts = Counter(all_gather(name))
    return ", ".join(f"{count} x {name}" for name, count in counts.items())


def barrier():
    """Wait for all processes, half of TIMEOUT at most: the error names those who do not come.

    Before waiting for a GPU: NCCL aborts a process after TIMEOUT, and does not know for whom it waited.
    """
    if dist.is_initialized():
        dist.group.WORLD.monitored_barrier(TIMEOUT / 2, wait_all_ranks=True)


def all_reduce(values):
    """Sum a list of floats over all processes, entry by entry; every process gets the sums."""
    if not dist.is_initialized():
        return values
    sums = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(sums)
    return sums.tolist()


def all_gather(value):
    """Every process's `value` as a list, in every process."""
    if not dist.is_initialized():
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def maybe_ddp(network):
    """The network inside DDP, with rank 0's weights and buffers in all processes; itself if there is only one."""
    if world_size() == 1:
        return network
    barrier()
    ddp_network = DistributedDataParallel(network, gradient_as_bucket_view=True)
    # Training does not read the running statistics of batch norm: no need to send rank 0's before
    # each step. Not an option above, as that is deprecated and would not send them at the start.
    ddp_network.broadcast_buffers = False
    return ddp_network


def broadcast_buffers(network):
    """Copy rank 0's buffers, such as batch norm's statistics, to all processes: while training, each keeps its own."""
    if dist.is_initialized():
        barrier()
        for buffer in network.buffers():
            dist.broadcast(buffer, 0)
