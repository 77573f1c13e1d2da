"""Processes: rank, world size and the few collectives that scripts need, with or without a launcher.

Joining and gathering are accelerate's, imported where they happen. Rank and world size are the launcher's variables:
who prints and who writes is asked before the processes join, which making accelerate's PartialState would do.
"""

import functools
import os
import socket
import sys


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


def local_device():
    """The torch.device of this process: its GPU, or the CPU where there is none."""
    import torch

    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def set_single_process_environment() -> None:
    """Give a process that no launcher started the variables of a world of one: without, DeepSpeed asks for mpi4py."""
    if "RANK" not in os.environ:
        world = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        os.environ.update({name: str(value) for name, value in world.items()})


def init_process_group() -> None:
    """Join the process group that torchrun or deepspeed announced, where nobody has; a no-op in a world of one."""
    if world_size() > 1:
        from accelerate import PartialState

        PartialState(cpu=local_device().type == "cpu")


def barrier() -> None:
    gather_objects(None)


def gather_objects(value: object) -> list[object]:
    """`value` of every rank, in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    from accelerate.utils import gather_object

    init_process_group()
    return gather_object([value])
