"""Sizes of memory: written by people, at hand on the device, and found missing."""

import re
from pathlib import Path

import torch

UNITS = {"": 1, "B": 1, "MB": 10**6, "GB": 10**9, "MIB": 2**20, "GIB": 2**30}
GIB = 2**30


def parse_size(text: str, flag: str) -> int:
    """Bytes in a size such as 32GiB, 500 MB or 1024; ValueError names `flag`."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in UNITS or float(match[1]) == 0:
        raise ValueError(f"{flag}: {text!r} is no size; write it as 32GiB, 32GB or 500MiB")
    return int(float(match[1]) * UNITS[match[2].upper()])


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that a tensor found no memory, on a GPU or on a CPU."""
    said = any(words in str(error) for words in ("allocate memory", "not enough memory"))
    return said or isinstance(error, (torch.OutOfMemoryError, MemoryError))


def free_host_memory() -> int | None:
    """Bytes of RAM that a process can still take; None where the system does not say."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return None
    fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024
