"""`longqlora COMMAND ...` after `pip install -e .`: the scripts of the checkout as one command.

    longqlora train --train_args_file F        longqlora chat --adapter_name_or_path output/run/final

The process becomes that of the script (exec), so a command is the script in every respect.
"""

import os
import sys
from pathlib import Path

from longqlora.cli import run_main
from longqlora.table import text_table

CHECKOUT = Path(__file__).resolve().parents[1]
COMMANDS = {
    "train": ("train.py", "train with the settings of a YAML"),
    "plan": ("script/plan_memory.py", "predict memory and time of a run"),
    "merge": ("script/merge_lora.py", "merge an adapter into its base"),
    "generate": ("script/inference/inference.py", "answer one prompt, or a file of prompts"),
    "chat": ("script/inference/chat.py", "chat in the terminal"),
    "serve": ("script/inference/serve.py", "serve an OpenAI-compatible endpoint"),
    "eval": ("script/evaluate/evaluate.py", "measure perplexity"),
    "compare": ("script/evaluate/compare.py", "measure methods side by side"),
}


def main() -> None:
    """Entry point of the installed command."""
    run_main(run_command)


def run_command() -> None:
    name, words = "".join(sys.argv[1:2]), sys.argv[2:]
    if name in ("", "-h", "--help"):
        rows = [(key, text, path) for key, (path, text) in COMMANDS.items()]
        return print(f"{__doc__}\n{text_table(('command', 'to', 'script'), rows, num_left=3)}")
    if name not in COMMANDS:
        raise ValueError(f"longqlora: no command {name!r}; choose from {', '.join(COMMANDS)}")
    script = CHECKOUT / COMMANDS[name][0]
    if not script.is_file():
        raise ValueError(
            f"longqlora {name}: no script at {str(script)!r}; the commands need the checkout: clone the repository and "
            "pip install -e . there"
        )
    os.execv(sys.executable, [sys.executable, str(script), *words])
