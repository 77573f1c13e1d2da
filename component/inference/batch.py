"""Answer a jsonl file of prompts into a jsonl file of answers, so that an interrupted run can be continued."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from longqlora.cli import require_file
from longqlora.data.jsonl import parse_line, read_rows
from longqlora.inference.generation import Generation


def read_prompts(path: str | os.PathLike, flag: str) -> list[dict]:
    """The objects of a jsonl file, each with a text under "prompt". Raises ValueError naming file and line."""
    with require_file(path, flag).open("rb") as file:
        prompts = [row for _, row in read_rows(file, path, flag=flag, parse=checked_prompt)]
    if not prompts:
        raise ValueError(f'{flag}: {str(path)!r} holds no prompts; give one {{"prompt": ...}} per line')
    return prompts


def checked_prompt(row: dict) -> dict:
    if not isinstance(row.get("prompt"), str):
        raise ValueError('no text under "prompt"; give {"prompt": ...}')
    return row


def partial_path(path: Path) -> Path:
    """Where the answers gather until all are there."""
    return Path(f"{path}.partial")


def write_answers(
    path: Path, prompts: list[dict], answer_prompts: Callable[[range], list[Generation]], *, batch_size: int = 1
) -> None:
    """Write each prompt with its answer to `path`, continuing what an interrupted run left in `partial_path`.

    answer_prompts: answers the prompts of the given positions, `batch_size` of them or fewer.
    """
    partial = partial_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    num_done = keep_finished_answers(partial, prompts)
    if num_done:
        print(f"continuing {str(partial)!r}: {num_done} of {len(prompts)} answers are there", file=sys.stderr)
    with partial.open("a", encoding="utf-8") as file:
        with tqdm(initial=num_done, total=len(prompts), desc="generate") as progress:
            for start in range(num_done, len(prompts), batch_size):
                positions = range(start, min(start + batch_size, len(prompts)))
                for position, answer in zip(positions, answer_prompts(positions), strict=True):
                    file.write(json.dumps(answered(prompts[position], answer), ensure_ascii=False) + "\n")
                file.flush()
                progress.update(len(positions))
    partial.replace(path)


def answered(prompt: dict, answer: Generation) -> dict:
    facts = {name: getattr(answer, name) for name in ("finish_reason", "num_prompt_tokens", "num_new_tokens")}
    return {**prompt, "output": answer.text, **facts}


def keep_finished_answers(partial: Path, prompts: list[dict]) -> int:
    """Number of whole answers in `partial`, which loses a last line that was cut off while being written.

    Raises ValueError where they answer other prompts.
    """
    if not partial.is_file():
        return 0
    data = partial.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    try:
        known = [parse_line(line)["prompt"] for line in whole.splitlines()]
    except (ValueError, KeyError):
        known = [None]
    if known != [record["prompt"] for record in prompts[: len(known)]]:
        raise ValueError(
            f"--output_file: {str(partial)!r} holds answers to other prompts; remove it or choose another name"
        )
    os.truncate(partial, len(whole))
    return len(known)
