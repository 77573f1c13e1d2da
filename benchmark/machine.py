"""What a measurement was made on: device, threads and software versions."""

import os
import platform
from pathlib import Path

import torch

from longqlora.cli import dtype_of
from longqlora.device import GIB
from longqlora.model.base import is_slow_on_cpu
from longqlora.run_record import software_versions


def describe_machine(device: torch.device) -> dict:
    """Facts that decide a timing, for the head of a table and for its JSON file."""
    facts = {"cpu": cpu_name(), "num_cpus": os.cpu_count(), "num_threads": torch.get_num_threads()}
    if hasattr(os, "getloadavg"):
        facts["load_average_at_start"] = round(os.getloadavg()[0], 2)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["gpu"] = properties.name
        facts["gpu_memory_gib"] = round(properties.total_memory / GIB, 1)
        facts["cuda"] = torch.version.cuda
    return {**facts, "versions": software_versions()}


def check_dtype(name: str, device: torch.device) -> None:
    """Refuse --dtype `name` on a CPU without such arithmetic, where a step takes minutes and says nothing."""
    if device.type == "cpu" and is_slow_on_cpu(dtype_of(name)):
        raise ValueError(f"--dtype: this CPU multiplies {name} many times slower than fp32; use fp32")


def cpu_name() -> str:
    """Model name of the processor, with the widest vector instructions torch uses on it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()} ({torch.backends.cpu.get_cpu_capability()})"


def machine_lines(facts: dict) -> str:
    """The same facts as two lines of text."""
    hardware = ", ".join(f"{name} {value}" for name, value in facts.items() if name != "versions")
    return f"{hardware}\n" + ", ".join(f"{name} {value}" for name, value in facts["versions"].items())
