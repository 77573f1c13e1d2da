"""Where the milliseconds of a training step go: the time of each operation itself, the largest first."""

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

NUM_ROWS = 15


def profile_step(step: Callable[[], float], device: torch.device) -> list[dict]:
    """One step's operations: name, calls, milliseconds on the device, and their part of all of them."""
    is_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_gpu else [])]
    with profile(activities=activities) as run:
        step()
    averages = run.key_averages()
    times = {event.key: event.self_device_time_total if is_gpu else event.self_cpu_time_total for event in averages}
    total = sum(times.values())
    rows = []
    for event in averages:
        time = times[event.key]
        rows.append({"name": event.key, "calls": event.count, "milliseconds": time / 1000, "share": time / total})
    return sorted(rows, key=lambda row: -row["milliseconds"])[:NUM_ROWS]


def format_profile(rows: list[dict]) -> str:
    lines = [f"\n{'operation':<60}{'calls':>8}{'ms':>10}{'share':>8}"]
    lines += [f"{r['name'][:58]:<60}{r['calls']:>8}{r['milliseconds']:>10.1f}{r['share']:>8.1%}" for r in rows]
    return "\n".join(lines)
