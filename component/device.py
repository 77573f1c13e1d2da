"""Memory and arithmetic of a machine: sizes as people write them, free memory, missing memory, bf16."""

import ctypes
import platform
import re

import psutil
import torch

GIB = 2**30
SIZE_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str, flag: str) -> int:
    """Bytes of a size such as "4GB", "500MB" or "2GiB"; `flag` names the option for the error.

    A number alone is bytes, but not a small one: who writes 32 means another unit.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]i?B|)\s*", text, flags=re.IGNORECASE)
    num_bytes = int(float(match[1]) * SIZE_UNITS[match[2].upper()]) if match else 0
    if num_bytes < 1:
        raise ValueError(f"{flag}: {text!r} is not a size; write one such as 4GB or 500MB")
    if not match[2] and num_bytes < SIZE_UNITS["MIB"]:
        raise ValueError(f"{flag}: {text!r} is a size without a unit; write one such as {match[1]}GB or {match[1]}MB")
    return num_bytes


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that a tensor found no memory, on a GPU or on a CPU."""
    said = any(words in str(error) for words in ("allocate memory", "not enough memory"))
    return said or isinstance(error, (torch.OutOfMemoryError, MemoryError))


def free_host_memory() -> int:
    """Bytes of RAM that a process can still take."""
    return psutil.virtual_memory().available


def reuse_freed_memory() -> None:
    """Let glibc keep what a step frees for the next one: fresh pages cost a tenth of a small model's CPU time.

    Blocks beyond 32 MiB, glibc's limit, still go back to the system. Does nothing with another C library.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if platform.libc_ver()[0] == "glibc" and mallopt is not None:
        mmap_threshold, trim_threshold = -3, -1
        mallopt(mmap_threshold, 32 * 2**20)
        mallopt(trim_threshold, 2**31 - 1)


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bf16 with instructions of its own; without, fp32 is 3 to 70 times as fast.

    oneDNN's answer honours DNNL_MAX_CPU_ISA, and on ARM it is the whole answer. On x86 it counts emulation in AVX-512.
    """
    if not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    return platform.machine() not in ("x86_64", "AMD64") or torch.cpu._is_avx512_bf16_supported()
