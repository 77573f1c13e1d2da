"""The main job on a small model, start to end, with the scripts a user would run: `make demo`.

    python script/demo.py [--train_args_file train_args/tiny-llama-pretrain.yaml] [--output_dir output/demo]

Trains on Python source of this machine's standard library: stretches data/tiny-llama from 256 to 1024 tokens with
`deepspeed train.py`, measures the base, the base with untrained position interpolation, the adapter and two merged
models on unseen source, and generates once. Ends with a table, two plots and report.json; fails if a claim fails.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from tabulate import tabulate

from longqlora.cli import run_main
from longqlora.distributed import free_port
from longqlora.files import read_json, write_json
from longqlora.outputs import OutputFolder, check_outputs
from longqlora.plot import draw_loss_by_position, draw_perplexity, new_figure

REPO = Path(__file__).resolve().parents[1]
BASE = REPO / "data" / "tiny-llama"
LENGTHS = (256, 512, 1024)
NUM_WINDOWS = 128
PROMPT = "def read_lines(path):\n"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train_args_file", type=Path, default=REPO / "train_args" / "tiny-llama-pretrain.yaml",
                        help="YAML of the training run (default: %(default)s)")  # fmt: skip
    parser.add_argument("--output_dir", type=Path, default=REPO / "output" / "demo",
                        help="folder for all that it writes (default: %(default)s)")  # fmt: skip
    return parser.parse_args()


class Steps:
    """Runs the commands of the demo one after the other, showing each and the seconds it took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def run(self, name: str, *command: object) -> str:
        words = [str(word) for word in command]
        print(f"\n== {name}\n$ {' '.join(words)}", flush=True)
        started = time.monotonic()
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "TRANSFORMERS_VERBOSITY": "error"}
        process = subprocess.Popen(words, cwd=REPO, env=environment, stdout=subprocess.PIPE, text=True)
        lines = []
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
        if process.wait() != 0:
            raise ValueError(f"the step {name!r} failed with exit code {process.returncode}; its output is above")
        self.seconds[name] = round(time.monotonic() - started, 1)
        return "".join(lines)

    def script(self, name: str, script: str, *arguments: object) -> str:
        return self.run(name, sys.executable, REPO / "script" / script, *arguments)


def evaluate(steps: Steps, name: str, ids: Path, output_dir: Path, *arguments: object) -> dict[int, dict]:
    """Results of one model by window length; every model is measured on the same windows."""
    output = output_dir / f"{name.replace(' ', '-')}.json"
    steps.script(
        f"evaluate {name}", "evaluate/evaluate.py", *arguments, "--data_path", ids, "--seq_len", *LENGTHS,
        "--sliding_window", LENGTHS[-1], "--max_windows", NUM_WINDOWS, "--batch_size", 4, "--dtype", "fp32",
        "--output_file", output,
    )  # fmt: skip
    return {result["seq_len"]: result for result in read_json(output)["results"]}


def loss_beyond(result: dict, position: int) -> float:
    """Mean loss over the positions from `position` on."""
    blocks = [block for block in result["loss_by_position"] if block["start"] >= position]
    weights = [block["end"] - block["start"] for block in blocks]
    return sum(block["loss"] * weight for block, weight in zip(blocks, weights, strict=True)) / sum(weights)


def check(report: dict) -> list[str]:
    """The claims of the demo; returns those that do not hold."""
    at_1024 = {name: row["1024"] for name, row in report["perplexity"].items()}
    beyond = report["loss_beyond_256"]
    claims = {
        "adapter at 1024: at most half of the base's perplexity": at_1024["adapter"] <= at_1024["base"] / 2,
        "adapter at 1024: at most half of untrained PI's perplexity": at_1024["adapter"] <= at_1024["base + PI"] / 2,
        "adapter past position 256: at least 0.5 nat below the base": beyond["adapter"] <= beyond["base"] - 0.5,
        "merged into NF4 weights: loss equals the adapter's to 1e-3": report["merge_difference_nf4"] <= 1e-3,
    }
    print("\n".join(f"{'ok    ' if holds else 'FAILED'} {claim}" for claim, holds in claims.items()))
    return [claim for claim, holds in claims.items() if not holds]


def main() -> None:
    args = parse_args()
    started, steps, out = time.monotonic(), Steps(), args.output_dir.resolve()
    corpus, ids, adapter = out / "corpus", out / "validation.bin", out / "adapter"
    final, merged, merged_nf4 = adapter / "final", out / "merged", out / "merged-nf4"
    check_outputs(
        {"--output_dir": OutputFolder(args.output_dir, corpus.name)},
        {"--train_args_file": args.train_args_file, "the base": BASE},
    )

    steps.script("corpus", "data/python_corpus.py", "--output_dir", corpus)
    steps.script(
        "tokenise", "data/tokenize_corpus.py", "--input", corpus / "validation.jsonl", "--tokenizer", BASE,
        "--output_file", ids, "--min_tokens", LENGTHS[-1],
    )  # fmt: skip
    launcher = Path(sys.executable).parent / "deepspeed"
    steps.run(
        "train", launcher, "--num_gpus", 1, "--master_port", free_port(), REPO / "train.py",
        "--train_args_file", args.train_args_file, "--train_file", corpus / "train.jsonl", "--output_dir", adapter,
        "--overwrite_output_dir", "true",
    )  # fmt: skip

    nf4 = ("--load_in_4bit",)
    results = {
        "base": evaluate(steps, "base", ids, out, "--base_model", BASE, *nf4),
        "base + PI": evaluate(steps, "base PI", ids, out, "--base_model", BASE, "--context_size", LENGTHS[-1], *nf4),
        "adapter": evaluate(steps, "adapter", ids, out, "--base_model", BASE, "--peft_model", final, *nf4),
    }
    merge = ("merge_lora.py", "--adapter_name_or_path", final, "--model_name_or_path", BASE, "--overwrite")
    # fp32, since rounding the merged weights to 16 bit alone moves this model's loss by a thousandth.
    steps.script("merge into NF4 weights", *merge, "--save_path", merged_nf4, "--dtype", "fp32", *nf4)
    steps.script("merge into 16-bit weights", *merge, "--save_path", merged)
    results["merged, NF4 weights"] = evaluate(steps, "merged nf4", ids, out, "--base_model", merged_nf4)
    results["merged, 16-bit weights"] = evaluate(steps, "merged", ids, out, "--base_model", merged)
    text = steps.script(
        "generate", "inference/inference.py", "--model_name_or_path", merged, "--prompt", PROMPT,
        "--max_new_tokens", 48, "--temperature", 0,
    )  # fmt: skip

    def difference(name: str) -> float:
        """Largest one in loss between a model and the adapter, over the window lengths."""
        return max(abs(results[name][length]["loss"] - results["adapter"][length]["loss"]) for length in LENGTHS)

    longest = {name: by_length[LENGTHS[-1]] for name, by_length in results.items()}
    report = {
        "perplexity": {
            name: {str(length): by_length[length]["perplexity"] for length in LENGTHS}
            for name, by_length in results.items()
        },
        "loss_beyond_256": {name: loss_beyond(result, 256) for name, result in longest.items()},
        "merge_difference_nf4": difference("merged, NF4 weights"),
        "merge_difference_16bit": difference("merged, 16-bit weights"),
        "protocol": {name: result["protocol"] for name, result in longest.items()},
        "generated": text,
        "training": {key: v for key, v in read_json(adapter / "train_results.json").items() if key != "log_history"},
        "run_record": read_json(final / "run_record.json"),
        "seconds": steps.seconds,
        "total_seconds": round(time.monotonic() - started, 1),
    }
    write_json(out / "report.json", report)
    perplexity = report["perplexity"].items()
    with new_figure(out / "perplexity.png") as (axis,):
        draw_perplexity(axis, {name: list(zip(LENGTHS, row.values(), strict=True)) for name, row in perplexity})
    with new_figure(out / "position.png") as (axis,):
        draw_loss_by_position(axis, {name: result["loss_by_position"] for name, result in longest.items()})

    rows = [[name, *row.values(), report["loss_beyond_256"][name]] for name, row in perplexity]
    formats = ("", *[".2f"] * len(LENGTHS), ".3f")
    table = tabulate(rows, ["perplexity", *LENGTHS, "loss past 256"], tablefmt="plain", floatfmt=formats)
    print(f"\n{table}\n\n{longest['adapter']['protocol']}\n")
    print(f"merging changed the loss by {report['merge_difference_nf4']:.1e} (NF4 weights) and "
               f"{report['merge_difference_16bit']:.1e} (16-bit weights: the adapter never saw these)")  # fmt: skip
    print(f"seconds: {json.dumps(steps.seconds)}, {report['total_seconds']} in all")
    print(f"wrote {out / 'report.json'}, perplexity.png and position.png")
    if failed := check(report):
        raise ValueError(f"the demo did not reach: {'; '.join(failed)}")


if __name__ == "__main__":
    run_main(main)
