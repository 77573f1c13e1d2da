"""The same training step by several contestants, each in a process of its own, one after another in one run."""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from longqlora.files import read_json, write_json
from longqlora.table import text_table

TRAIN_STEP = Path(__file__).with_name("train_step.py")
OWN, ATTENTIONS = "ours", ("s2", "full")


def compare_steps(args: argparse.Namespace) -> None:
    """Run train_step.py for ours, each policy with S2-Attn and full attention, and for args.peers; print the table."""
    contestants = {}
    for attention in ATTENTIONS:
        for memory in args.memory or [None]:
            name = ", ".join(filter(None, (OWN, memory, attention)))
            contestants[name] = {"contestant": OWN, "memory": memory, "attention": attention}
    contestants |= {peer: {"contestant": peer, "memory": None, "attention": "full"} for peer in args.peers}
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, own in contestants.items():
            results[name] = result = run_contestant(args, own, Path(folder) / "result.json")
            told = result.get("error") or f"{result['median_seconds']:.2f} s a step"
            print(f"{name}: {told}", flush=True)
    summary = ratios(results)
    print(format_comparison(results, summary))
    if args.output_file:
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
        write_json(args.output_file, {"settings": settings, "results": results, "ratios": summary})
    if args.plot:
        plot_comparison(results, args.plot)


def run_contestant(args: argparse.Namespace, own: dict[str, str | None], output: Path) -> dict:
    """The result of one contestant, or the error that ended it; own: the flags in which it differs."""
    given = {key: value for key, value in vars(args).items() if key not in ("peers", "plot")}
    given |= {**own, "output_file": output}
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
    peers = [result for name, result in results.items() if not name.startswith(OWN) and "error" not in result]
    if not peers:
        return {}
    seconds, extra = (min(peer[key] for peer in peers) for key in ("median_seconds", "extra_bytes"))
    return {
        name: {"speed": seconds / results[name]["median_seconds"], "memory": results[name]["extra_bytes"] / extra}
        for name in results
        if name.startswith(OWN) and "error" not in results[name]
    }


def format_comparison(results: dict[str, dict], summary: dict[str, dict[str, float]]) -> str:
    """A row for each contestant, with speed and memory against the best of the peers."""
    header, rows = ("contestant", "s a step", "CPU s", "tokens/s", "extra MiB", "speed", "memory"), []
    for name, result in results.items():
        if "error" in result:
            rows.append([f"{name}: {result['error']}", *[None] * 6])
            continue
        times = result["median_seconds"], min(result["cpu_seconds"])
        rows.append([name, *times, round(result["tokens_per_second"]), round(result["extra_bytes"] / 2**20)])
        own = summary.get(name)
        rows[-1] += [f"{own['speed']:.2f}x", f"{own['memory']:.1%}"] if own else [None, None]
    return "\n" + text_table(header, rows)


def plot_comparison(results: dict[str, dict], path: Path) -> None:
    """Speed against extra memory: up and to the left is better."""
    from longqlora.plot import new_figure

    with new_figure(path) as (axis,):
        for name, result in results.items():
            if "error" in result:
                continue
            place = result["extra_bytes"] / 2**20, result["tokens_per_second"]
            colour, marker = (
                ("tab:blue", "o" if name.endswith("s2") else "s") if name.startswith(OWN) else ("grey", "X")
            )
            axis.plot(*place, marker, color=colour)
            axis.annotate(name, place, xytext=(6, 4), textcoords="offset points", fontsize=8)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:.0f}")
        axis.margins(x=0.25, y=0.15)
        axis.set_ylim(bottom=0)
        axis.set(xlabel="memory of a step beside the weights (MiB)", ylabel="tokens per second")
