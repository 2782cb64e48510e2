"""Rank, world size, set-up and gathering: the little that train.py needs to know of processes."""

import os
from collections import Counter

import torch
import torch.distributed as dist

from src.usage import UserError


def set_up():
    """Join the processes that torchrun started, if it did; return this process's device."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise UserError(f"{torch.cuda.device_count()} GPUs here: use no more processes")
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        # gloo carries Python objects and flags, NCCL the gradients.
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return device


def tear_down():
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        # gloo's threads may still hold tensors of the last sum, and wait for Python to free them
        # while Python waits for the threads (seen in torch 2.6): a barrier holds none.
        dist.barrier()
        dist.destroy_process_group()


def rank():
    """Number of this process, 0 for the one that writes files."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def say(text):
    """Print from one process only."""
    if rank() == 0:
        print(text, flush=True)


def devices(device):
    """What all processes run on, as rank 0 says it: "8 x NVIDIA H100", "1 x CPU (16 threads)"; else "".

    device is this process's; collective.
    """
    name = f"CPU ({torch.get_num_threads()} threads)"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    counts = Counter(gather(name) or [])
    return ", ".join(f"{count} x {name}" for name, count in counts.items())


def total(values):
    """Sum a list of floats over all processes, entry by entry; every process gets the sums."""
    if not dist.is_initialized():
        return values
    sums = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(sums)
    return sums.tolist()


def gather(value):
    """Return every process's `value` as a list on rank 0, None elsewhere."""
    if not dist.is_initialized():
        return [value]
    values = [None] * world_size() if rank() == 0 else None
    dist.gather_object(value, values)
    return values


def share_buffers(network):
    """Give every process rank 0's buffers: DDP does so only before a step, not after the last."""
    if dist.is_initialized():
        for buffer in network.buffers():
            dist.broadcast(buffer, 0)
