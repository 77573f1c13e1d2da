"""Generate once from one prompt or from a file of prompts.

    python script/inference/inference.py --model_name_or_path output/merged --prompt "Once upon a time"
    python script/inference/inference.py --adapter_name_or_path output/run/checkpoint-1000 --prompt_file paper.txt
    python script/inference/inference.py --model_name_or_path output/merged --file paper.pdf --prompt "Summarise it."
    python script/inference/inference.py --model_name_or_path output/merged \\
        --input_file prompts.jsonl --output_file answers.jsonl --batch_size 8

A prompt is continued as raw text behind the BOS token, as in pretraining, or put as one user message into
the template that the model was tuned with (--prompt_template). Text goes to stdout, everything else to stderr.

--input_file holds one JSON object with "prompt" per line; each line of --output_file is that object with
"output", "finish_reason", "num_prompt_tokens" and "num_new_tokens" added. An interrupted run leaves
OUTPUT_FILE.partial and is continued by the same command.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

from longqlora.cli import require_file, require_stdin, run_main
from longqlora.data.documents import FORMAT_LIST, read_document, with_documents
from longqlora.files import decode_utf8
from longqlora.inference.arguments import load_from_arguments, model_sources, parse_generation, source_from_arguments
from longqlora.inference.batch import partial_path, read_prompts, write_answers
from longqlora.inference.generation import NO_TEMPLATE, encode_prompt, generate_text, generate_texts
from longqlora.inference.source import ModelSource
from longqlora.outputs import check_outputs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", metavar="TEXT", help="the prompt itself")
    source.add_argument("--prompt_file", metavar="PATH", help="UTF-8 text file with the prompt, - for stdin")
    source.add_argument("--input_file", metavar="PATH", help="jsonl file of prompts; needs --output_file")
    parser.add_argument("--file", metavar="PATH", action="append", default=[], help="document that goes before the "
                        f"prompt ({FORMAT_LIST}); may be given several times")  # fmt: skip
    parser.add_argument("--output_file", metavar="PATH", help="jsonl file for the answers to --input_file")
    parser.add_argument("--batch_size", type=int, default=1, help="prompts of --input_file at once; a greedy answer is "
                        "that of its prompt alone, but for rounding (default: %(default)s)")  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace an --output_file that is there")
    parser.add_argument("--raw", action="store_true", help="short for --prompt_template none")
    parser.add_argument("--truncate_prompt", action="store_true", help="keep the end of a prompt that is too long")
    parser.add_argument("--stream", action=argparse.BooleanOptionalAction, default=True,
                        help="print the text as it is generated (default: yes)")  # fmt: skip


def check_arguments(args: argparse.Namespace) -> None:
    if bool(args.input_file) != bool(args.output_file):
        raise ValueError("--input_file and --output_file go together; give both or neither")
    if args.file and args.input_file:
        raise ValueError("--file goes with --prompt or --prompt_file; put the documents into the rows of --input_file")
    if args.batch_size < 1 or (args.batch_size > 1 and not args.input_file):
        raise ValueError(f"--batch_size {args.batch_size}: must be at least 1, and goes with --input_file")
    if args.raw and args.prompt_template not in ("auto", NO_TEMPLATE):
        raise ValueError(f"--raw and --prompt_template {args.prompt_template} contradict each other; give one")
    if args.output_file:
        outputs = [args.output_file, partial_path(Path(args.output_file))]
        check_outputs({"--output_file": outputs}, {"--input_file": args.input_file, **model_sources(args)})
        if Path(args.output_file).exists() and not args.overwrite:
            raise ValueError(f"--output_file: {args.output_file!r} exists; choose another or pass --overwrite")


def requested_prompts(args: argparse.Namespace) -> list[dict]:
    """The prompts of whichever source was given, as objects with "prompt"."""
    if args.input_file:
        return read_prompts(args.input_file, "--input_file")
    prompt, path, flag = args.prompt, args.prompt_file, "--prompt_file"
    if path is not None:
        data = require_stdin().buffer.read() if path == "-" else require_file(path, flag).read_bytes()
        prompt = decode_utf8(data, flag, path)
    return [{"prompt": with_documents(prompt, [(path, read_document(path, flag="--file")) for path in args.file])}]


def fitted_prompts(args: argparse.Namespace, source: ModelSource, prompts: list[dict]) -> list[list[int]]:
    """Ids of every prompt, fitted to the context; a prompt at fault is named by its number.

    One that is cut keeps its first token (BOS) and leaves room for the answer, at most half of the context.
    """
    template = source.template(NO_TEMPLATE if args.raw else args.prompt_template)
    if template == NO_TEMPLATE and args.system:
        raise ValueError("--system: a raw prompt has no system message; give a --prompt_template too")
    size, max_new_tokens, rows = source.context_size, args.max_new_tokens, []
    for number, record in enumerate(prompts, start=1):
        where = f"prompt {number}: " if args.input_file else ""
        try:
            ids = encode_prompt(source.tokenizer, record["prompt"], template=template, system=args.system)
        except ValueError as error:
            raise ValueError(f"{where}{error}") from None
        if len(ids) >= size:
            if not args.truncate_prompt:
                raise ValueError(f"{where}the prompt has {len(ids)} tokens and the context {size}; shorten it, raise "
                                 "--context_size or pass --truncate_prompt to keep its end")  # fmt: skip
            room = size - min(max_new_tokens, size // 2)
            warn(f"{where}kept {room} of {len(ids)} tokens of the prompt")
            ids = [ids[0], *ids[len(ids) - room + 1 :]]
        if len(ids) + max_new_tokens > size:
            warn(f"{where}{len(ids)} prompt tokens and --max_new_tokens {max_new_tokens} go beyond the context of "
                 f"{size} tokens; an answer that long may be poor at its end")  # fmt: skip
        rows.append(ids)
    return rows


def warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)


def main() -> None:
    args, options = parse_generation(__doc__, add_arguments, template=NO_TEMPLATE)
    check_arguments(args)
    prompts = requested_prompts(args)
    source = source_from_arguments(args)
    # With it comes transformers, which --help and bad input do not wait for.
    from longqlora.model.context import rope_that_follows_length

    if args.batch_size > 1 and (rope_type := rope_that_follows_length(source.config)):
        raise ValueError(f"--batch_size: {rope_type} RoPE turns every row by the longest of its batch; leave it out")
    rows = fitted_prompts(args, source, prompts)
    loaded = load_from_arguments(args, source)
    sys.stdout.reconfigure(errors="replace")

    def answer(position: int, on_text=None):
        return generate_text(loaded.model, loaded.tokenizer, rows[position], options, on_text=on_text)

    def answer_batch(positions: range):
        return generate_texts(loaded.model, loaded.tokenizer, [rows[position] for position in positions], options)

    if args.input_file:
        if args.overwrite and Path(args.output_file).exists():
            partial_path(Path(args.output_file)).unlink(missing_ok=True)
        write_answers(Path(args.output_file), prompts, answer_batch, batch_size=args.batch_size)
    elif args.stream:
        answer(0, on_text=partial(print, end="", flush=True))
        print()
    else:
        print(answer(0).text)


if __name__ == "__main__":
    run_main(main)
