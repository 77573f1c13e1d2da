"""Write docs/data_formats.md: published forms of training data, each trained on for two steps as it is published.

    python docs/list_data_formats.py [NAME ...]

The rows are invented; their keys, nesting and file format are those of the projects. data/tiny-llama learns from a file
of two such rows. Without NAME, all forms of `FORMS` are tried.
"""

import argparse
import contextlib
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from longqlora.cli import run_main

REPO = Path(__file__).resolve().parents[1]
PAGE, RESULTS = REPO / "docs" / "data_formats.md", REPO / "docs" / "results" / "data_formats.json"
# A template with tools, for the form that needs one.
CHAT_TEMPLATE = (
    "{% if tools %}<|tools|>{{ tools | tojson }}\n{% endif %}{% for m in messages %}<|{{ m.role }}|>"
    "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}{{ m.content }}"
    "{{ eos_token if m.role == 'assistant' else '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
QUESTION, ANSWER = "When does the ferry leave?", "At nine, from the north quay."
NEXT_QUESTION, NEXT_ANSWER = "And on Sundays?", "There is none on Sundays."
REPORT = "The harbour office counted 412 boats in May, twice as many as in April."
TIME_TABLE = {
    "name": "time_table",
    "description": "Departures of a line",
    "parameters": {"type": "object", "properties": {"line": {"type": "string"}}, "required": ["line"]},
}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


class Form(NamedTuple):
    """whose: project or data set that publishes it; file: its name and format; row: one in this form."""

    whose: str
    file: str
    row: dict[str, Any]
    is_chat: bool = True
    has_tools: bool = False


FORMS = {
    "longqlora": Form("LongQLoRA-SFT-Data-39k", "sft.jsonl", {"input": QUESTION, "output": ANSWER}),
    "text": Form("LongQLoRA-Pretrain-Data-54k, RedPajama", "pretrain.jsonl", {"text": REPORT}, is_chat=False),
    "longalpaca": Form(
        "LongAlpaca-12k",
        "LongAlpaca-12k.json",
        {"instruction": f"{REPORT} How many were it in May?", "output": "412.", "input": "", "file": "harbour.pdf"},
    ),
    "longalign": Form(
        "LongAlign-10k",
        "long.jsonl",
        {"messages": [user(f"{REPORT}\n\nWho counted?"), assistant("The harbour office.")], "length": 42},
    ),
    "sharegpt": Form(
        "ShareGPT (vicuna_unfiltered)",
        "sharegpt.json",
        {"id": "x1_0", "conversations": [
            {"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER},
            {"from": "human", "value": NEXT_QUESTION}, {"from": "gpt", "value": NEXT_ANSWER},
        ]},
    ),
    "openai_tools": Form(
        "OpenAI (fine-tuning with tools)",
        "tools.jsonl",
        {"messages": [
            {"role": "system", "content": "You work at the quay."}, user(QUESTION),
            {"role": "assistant", "tool_calls": [
                {"id": "call_1", "type": "function", "function": {"name": "time_table", "arguments": '{"line": "N"}'}},
            ]},
            {"role": "tool", "tool_call_id": "call_1", "content": "09:00 north quay"}, assistant(ANSWER),
        ], "tools": [{"type": "function", "function": TIME_TABLE}], "parallel_tool_calls": False},
        has_tools=True,
    ),
    "alpaca": Form(
        "tatsu-lab/alpaca",
        "train-00000-of-00001.parquet",
        {"instruction": "Shorten the sentence.", "input": REPORT, "output": "412 boats came.",
         "text": f"### Instruction:\nShorten the sentence.\n\n### Input:\n{REPORT}\n\n### Response:\n412 boats came."},
    ),
    "llama_factory": Form(
        "LLaMA-Factory",
        "alpaca_zh.json",
        {"instruction": NEXT_QUESTION, "input": "", "output": NEXT_ANSWER, "system": "You work at the quay.",
         "history": [[QUESTION, ANSWER]]},
    ),
    "trl": Form("TRL (prompt-completion)", "trl.jsonl", {"prompt": QUESTION, "completion": f" {ANSWER}"}),
    "trl_messages": Form(
        "TRL (conversational)", "trl_chat.jsonl", {"prompt": [user(QUESTION)], "completion": [assistant(ANSWER)]}
    ),
    "chunkllama": Form(
        "ChunkLlama (chunkllama-long-dialog)",
        "long_dialog.jsonl",
        {"inputs": [QUESTION, NEXT_QUESTION], "outputs": [ANSWER, NEXT_ANSWER]},
    ),
    "firefly": Form(
        "Firefly",
        "firefly.jsonl",
        {"conversation_id": 1, "category": "travel", "conversation": [
            {"human": QUESTION, "assistant": ANSWER}, {"human": NEXT_QUESTION, "assistant": NEXT_ANSWER},
        ]},
    ),
    "no_robots": Form(
        "HuggingFaceH4/no_robots",
        "no_robots.parquet",
        {"prompt": QUESTION, "prompt_id": "c0ffee", "messages": [user(QUESTION), assistant(ANSWER)], "category": "QA"},
    ),
    "fineweb": Form(
        "HuggingFaceFW/fineweb",
        "000_00000.parquet",
        {"text": REPORT, "id": "<urn:uuid:1>", "dump": "CC-MAIN-2026-01", "url": "https://example.org/boats",
         "date": "2026-01-02T03:04:05Z", "file_path": "s3://example/boats.warc.gz", "language": "en",
         "language_score": 0.98, "token_count": 19},
        is_chat=False,
    ),
}  # fmt: skip


def parse_command_line() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *FORMS], metavar="NAME", help="forms (default: all)")
    parser.add_argument("--results", type=Path, help="keep results in this file, and leave the page as it is")
    return parser.parse_args()


def main() -> None:
    args = parse_command_line()
    from tqdm import tqdm

    from longqlora.files import atomic_file, read_json, write_json

    results = args.results or RESULTS
    known = read_json(results) if results.is_file() else {}
    found = known | {name: try_form(FORMS[name]) for name in tqdm(args.names or FORMS, file=sys.__stderr__)}
    found = {name: found[name] for name in FORMS if name in found}
    write_json(results, found)
    if not args.results:
        with atomic_file(PAGE) as file:
            file.write(formats_page(found))


def write_file(form: Form, folder: Path) -> Path:
    """A file of two rows of the form."""
    path, rows = folder / form.file, [form.row, form.row]
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet

        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text(json.dumps(rows) if path.suffix == ".json" else "".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def try_form(form: Form) -> dict[str, Any]:
    """What a run of two steps says of the form: its name, the template, the first row; and the losses."""
    import yaml

    sys.path.insert(0, str(REPO))
    import train

    with tempfile.TemporaryDirectory() as name, open(os.devnull, "w") as nowhere:
        folder = Path(name)
        output, settings = folder / "output", folder / "train.yaml"
        model = shutil.copytree(REPO / "data" / "tiny-llama", folder / "model")
        if form.has_tools:
            (model / "chat_template.jinja").write_text(CHAT_TEMPLATE)
        values = {
            "model_name_or_path": str(model), "train_file": str(write_file(form, folder)), "sft": form.is_chat,
            "output_dir": str(output), "data_cache_dir": str(folder / "cache"), "finetuning_type": "lora",
            "lora_rank": 4, "max_seq_length": 256, "max_steps": 2, "learning_rate": 1e-3, "logging_steps": 1,
            "save_strategy": "no", "report_to": "none", "seed": 0,
        }  # fmt: skip
        settings.write_text(yaml.safe_dump(values))
        sys.argv = ["train.py", "--train_args_file", str(settings)]
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            train.main()
        log = (output / "train.log").read_text(encoding="utf-8")
        history = json.loads((output / "train_results.json").read_text())["log_history"]
        record = json.loads((output / "run_record.json").read_text())
    source, row = (
        next(line.partition(mark)[2] for line in log.splitlines() if mark in line)
        for mark in (": 2 rows from 2", "row: ")
    )
    return {
        "form": source.partition("form ")[2].partition(";")[0] or "text",
        "template": record["arguments"]["data"]["prompt_template"] if form.is_chat else "none",
        "row": row,
        "losses": [round(entry["loss"], 4) for entry in history if "loss" in entry],
    }


def formats_page(found: dict[str, dict]) -> str:
    """The text of docs/data_formats.md: its head as it is, then the table and the rows, each once."""
    head = PAGE.read_text(encoding="utf-8").split("\n## ")[0]
    columns = ("published by", "file", "keys", "read as", "template", "losses")
    lines = [columns, ("---",) * len(columns)]
    for name, row in found.items():
        form = FORMS[name]
        keys = ", ".join(f"`{key}`" for key in form.row)
        losses = ", ".join(f"{loss:.2f}" for loss in row["losses"])
        lines.append((form.whose, f"`.{form.file.rpartition('.')[2]}`", keys, row["form"], row["template"], losses))
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    shown: dict[str, list[str]] = {}
    for name, row in found.items():
        shown.setdefault(row["row"], []).append(FORMS[name].whose)
    rows = [f"**{', '.join(whose)}**\n\n```text\n{row}\n```\n" for row, whose in shown.items()]
    return f"{head}\n## Forms\n\n{table}\n## The first row of each\n\n" + "\n".join(rows)


if __name__ == "__main__":
    run_main(main)
