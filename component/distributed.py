"""Rank, world size and the few collectives that scripts need, with or without a launcher."""

import functools
import os
import socket
import sys

import torch
import torch.distributed as dist


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    return rank() == 0


def print_main(*args, **kwargs) -> None:
    """Print on rank 0 only."""
    if is_main_process():
        print(*args, **kwargs, flush=True)


@functools.cache
def print_notice(text: str) -> None:
    """Print `text` on stderr of rank 0, the first time it is said."""
    print_main(f"notice: {text}", file=sys.stderr)


def local_device() -> torch.device:
    """The device of this process: its GPU, or the CPU where there is none."""
    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def set_single_process_environment() -> None:
    """Give a process that no launcher started the variables of a world of one.

    DeepSpeed asks for mpi4py when they are missing.
    """
    if "RANK" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    defaults = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in defaults.items()})


def init_process_group() -> None:
    """Join the process group that torchrun or deepspeed announced; a no-op in a world of one."""
    if world_size() > 1 and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(local_rank())
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def gather_objects(value: object) -> list[object]:
    """`value` of every rank, in rank order, on every rank."""
    if not dist.is_initialized():
        return [value]
    gathered = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered
