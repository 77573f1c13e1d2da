"""The same training step by several contestants, each in a process of its own, one after another in one run."""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from longqlora.files import read_json, write_json

TRAIN_STEP = Path(__file__).with_name("train_step.py")
OWN = ("ours, s2", "ours, full")


def compare_steps(args: argparse.Namespace) -> None:
    """Run train_step.py for ours, with S2-Attn and with full attention, and for each of args.peers; print the table."""
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in (*OWN, *args.peers):
            result = run_contestant(args, name, Path(folder) / "result.json")
            results[name] = result
            told = result.get("error") or f"{result['median_seconds']:.2f} s a step"
            print(f"{name}: {told}", flush=True)
    summary = ratios(results)
    print(format_comparison(results, summary))
    if args.output_file:
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
        write_json(args.output_file, {"settings": settings, "results": results, "ratios": summary})
    if args.plot:
        plot_comparison(results, args.plot)


def run_contestant(args: argparse.Namespace, name: str, output: Path) -> dict:
    """The result of one contestant, or the error that ended it."""
    contestant, _, attention = name.partition(", ")
    given = {key: value for key, value in vars(args).items() if key not in ("peers", "plot", "output_file")}
    given |= {"contestant": contestant, "attention": attention or "full", "output_file": output}
    words = []
    for key, value in given.items():
        if isinstance(value, bool):
            words.append(f"--{key}" if value else f"--no-{key}")
        elif value is not None:
            words += [f"--{key}", str(value)]
    # Idle threads that spin take the cores from threads that work.
    environment = {"OMP_WAIT_POLICY": "passive", **os.environ}
    command = [sys.executable, str(TRAIN_STEP), *words]
    outcome = subprocess.run(command, capture_output=True, text=True, env=environment)
    if outcome.returncode != 0:
        return {"error": (outcome.stderr.strip().splitlines() or ["no message"])[-1]}
    return read_json(output, "result")


def ratios(results: dict[str, dict]) -> dict[str, dict[str, float]]:
    """For each of ours: how many times faster than the fastest peer, and memory as a part of the leanest peer's."""
    peers = [result for name, result in results.items() if name not in OWN and "error" not in result]
    if not peers:
        return {}
    seconds, extra = (min(peer[key] for peer in peers) for key in ("median_seconds", "extra_bytes"))
    return {
        name: {"speed": seconds / results[name]["median_seconds"], "memory": results[name]["extra_bytes"] / extra}
        for name in OWN
        if "error" not in results[name]
    }


def format_comparison(results: dict[str, dict], summary: dict[str, dict[str, float]]) -> str:
    lines = [f"\n{'contestant':<16}{'s a step':>10}{'tokens/s':>10}{'extra MiB':>11}   vs best peer: speed  memory"]
    for name, result in results.items():
        if "error" in result:
            lines.append(f"{name:<16}{result['error']}")
            continue
        line = f"{name:<16}{result['median_seconds']:>10.2f}{result['tokens_per_second']:>10.0f}"
        line += f"{result['extra_bytes'] / 2**20:>11.0f}"
        if name in summary:
            line += f"{summary[name]['speed']:>21.2f}x{summary[name]['memory']:>8.1%}"
        lines.append(line)
    return "\n".join(lines)


def plot_comparison(results: dict[str, dict], path: Path) -> None:
    """Bars of time and extra memory."""
    from longqlora.plot import new_figure

    measured = {name: result for name, result in results.items() if "error" not in result}
    kinds = (("median_seconds", 1, "seconds a step"), ("extra_bytes", 2**20, "extra memory, MiB"))
    with new_figure(path, len(kinds)) as panels:
        for axes, (key, unit, label) in zip(panels, kinds, strict=True):
            colours = ["tab:blue" if name in OWN else "tab:grey" for name in measured]
            axes.barh(list(measured), [result[key] / unit for result in measured.values()], color=colours)
            axes.invert_yaxis()
            axes.set_xlabel(label)
