r"""Score a model's answers to questions about long texts: F1, ROUGE, exact match, multiple choice.

    python script/evaluate/longtask.py --model_name_or_path output/merged --data_path qasper.jsonl gov_report.jsonl \
        --output_file longtask.json --plot longtask.png
    torchrun --nproc_per_node 2 script/evaluate/longtask.py ...        # the same numbers from two processes

Rows are {"context", "question", "references"}, or with "options" and "answer" a multiple choice; rows of LongBench and
L-Eval are read as they are (data/README.md). Answers are greedy. A text that is longer than the context
loses its middle, which the result says for each row. Scores are between 0 and 1. With --output_file a killed run goes
on where it stopped when it is started again with the same arguments.
"""

import argparse
from dataclasses import asdict
from pathlib import Path

from longqlora.cli import run_main
from longqlora.evaluation.longtask.prompts import (
    QUESTION_LEAD,
    PromptForm,
    check_fits,
    fitted_prompt,
    letter_ids,
    log_likelihoods,
)
from longqlora.evaluation.longtask.report import (
    plot_tasks,
    score_answer,
    summarize_lengths,
    summarize_tasks,
    task_table,
)
from longqlora.evaluation.longtask.scores import METRICS, require_rouge
from longqlora.evaluation.longtask.tasks import LongTask, needs_rouge, read_tasks
from longqlora.evaluation.perplexity import json_safe
from longqlora.files import write_json
from longqlora.inference.arguments import (
    TEMPLATE_NAMES,
    add_model_arguments,
    check_model_arguments,
    load_from_arguments,
    model_sources,
    text_template,
)
from longqlora.inference.generation import NO_TEMPLATE, GenerationOptions, generate_text
from longqlora.outputs import check_results


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--data_path", nargs="+", required=True, metavar="PATH", help="jsonl files of questions")
    parser.add_argument("--metric", choices=("auto", *METRICS), default="auto",
                        help="auto: what the row names, else accuracy for options, rougeL for long references and f1 "
                        "for short ones (default: auto)")  # fmt: skip
    parser.add_argument("--rouge_stemmer", action=argparse.BooleanOptionalAction, default=True,
                        help="compare the stems of English words in ROUGE (default: yes)")  # fmt: skip
    parser.add_argument("--max_rows", type=int, metavar="N", help="the first N rows of each file (default: all)")
    parser.add_argument("--max_new_tokens", type=int, default=128,
                        help="longest answer in tokens; prompts leave room for it (default: %(default)s)")  # fmt: skip
    parser.add_argument("--num_shots", type=int, default=0, metavar="N",
                        help="examples with answers before each question (default: %(default)s)")  # fmt: skip
    parser.add_argument("--shots_file", metavar="PATH", help="jsonl file of the examples; the context may be missing")
    parser.add_argument("--choice_scoring", choices=("generation", "loglikelihood"), default="generation",
                        help="take the option that the answer names, or the one whose letter is most likely "
                        "(default: generation)")  # fmt: skip
    parser.add_argument("--prompt_template", choices=TEMPLATE_NAMES, default="auto",
                        help="none continues raw text; auto is the template the model was tuned with, as far as its "
                        "run record or tokenizer tell, and else none (default: auto)")  # fmt: skip
    parser.add_argument("--output_file", type=Path, metavar="PATH",
                        help="JSON file for the means and every answer; also makes the run resumable")  # fmt: skip
    parser.add_argument("--plot", metavar="PATH", help="image (.png, .pdf or .svg) of scores by task and by length")
    return parser.parse_args()


def check_arguments(args: argparse.Namespace) -> tuple[list[LongTask], list[LongTask]]:
    """The questions and the examples, or a ValueError for what is wrong, before anything heavy is imported."""
    check_model_arguments(args)
    for name, least in (("max_rows", 1), ("num_shots", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"--{name}: must be at least {least}, got {value}")
    GenerationOptions(max_new_tokens=args.max_new_tokens)
    if bool(args.num_shots) != bool(args.shots_file):
        raise ValueError("--num_shots and --shots_file go together; give both or neither")
    sources = model_sources(args.model_name_or_path, args.adapter_name_or_path)
    check_results(args, {"--data_path": args.data_path, "--shots_file": args.shots_file, **sources})
    tasks = read_tasks(args.data_path, "--data_path", max_rows=args.max_rows)
    shots = read_tasks([args.shots_file], "--shots_file", needs_context=False) if args.shots_file else []
    unfit = next((task for task in tasks if args.metric == "accuracy" and not (task.options or task.has_letters)), None)
    if unfit:
        raise ValueError(
            f"--metric accuracy: question {unfit.id} of {unfit.task} has no options; choose another metric"
        )
    if needs_rouge(tasks, args.metric):
        require_rouge()
    return tasks, shots


def prompt_form(args: argparse.Namespace, loaded, shots: list[LongTask], tasks: list[LongTask]) -> PromptForm:
    """The form of all prompts, checked against every question."""
    template = text_template(args, loaded)
    if args.max_new_tokens >= loaded.context_size:
        raise ValueError(
            f"--max_new_tokens: {args.max_new_tokens} leave no room for a prompt in the context of "
            f"{loaded.context_size} tokens; give fewer"
        )
    form = PromptForm(template, loaded.context_size, args.max_new_tokens, tuple(shots), args.num_shots)
    for task in tasks:
        if len(form.shots_for(task)) < args.num_shots:
            raise ValueError(
                f"--num_shots {args.num_shots}: --shots_file has {len(shots)} examples, and none may be the question "
                "itself; give more or lower --num_shots"
            )
        check_fits(loaded.tokenizer, task, form)
    return form


def answer_with(args: argparse.Namespace, loaded, form: PromptForm):
    """The function that answers one task, given as a mapping; its result is ready for JSON."""
    # Raw text goes on with the next question after an answer, in our own layout.
    stop = (f"\n{QUESTION_LEAD.strip()}",) if form.template == NO_TEMPLATE else ()
    options = GenerationOptions(do_sample=False, max_new_tokens=args.max_new_tokens, stop=stop)

    def answer(trial) -> dict:
        fields = {name: tuple(value) if isinstance(value, list) else value for name, value in trial.items()}
        task = LongTask(**fields)
        prompt = fitted_prompt(loaded.tokenizer, task, form)
        facts = {
            "num_context_tokens": prompt.num_context_tokens,
            "num_tokens_cut": prompt.num_tokens_cut,
            "num_prompt_tokens": len(prompt.ids),
        }
        if task.options and args.choice_scoring == "loglikelihood":
            letters = letter_ids(loaded.tokenizer, prompt, len(task.options), form.template)
            scores = log_likelihoods(loaded.model, prompt.ids, letters)
            choice = scores.index(max(scores))
            return {"answer": task.options[choice], "choice": choice, "log_likelihoods": scores, **facts}
        generated = generate_text(loaded.model, loaded.tokenizer, prompt.ids, options)
        facts |= {"num_new_tokens": generated.num_new_tokens, "finish_reason": generated.finish_reason}
        return {"answer": generated.text.strip(), **facts}

    return answer


def evaluate(args: argparse.Namespace, tasks: list[LongTask], shots: list[LongTask]) -> None:
    """Load the model, answer every question, and write what came out."""
    import torch

    from longqlora.distributed import init_process_group, is_main_process
    from longqlora.evaluation.trials import finish_trials, run_trials
    from longqlora.inference.load import model_facts, model_fingerprint

    init_process_group()
    loaded = load_from_arguments(args)
    form = prompt_form(args, loaded, shots, tasks)
    settings = {
        "prompt_template": form.template,
        "max_new_tokens": args.max_new_tokens,
        "num_shots": args.num_shots,
        "choice_scoring": args.choice_scoring,
    }
    fingerprint = {**model_fingerprint(loaded), **settings, "shots": [asdict(shot) for shot in shots]}
    trials = [{name: list(value) if isinstance(value, tuple) else value for name, value in asdict(task).items()}
              for task in tasks]  # fmt: skip
    answers = run_trials(
        trials,
        answer_with(args, loaded, form),
        output_file=args.output_file,
        fingerprint=fingerprint,
        desc="long tasks",
    )
    if is_main_process():
        rows = [score_answer(task, answer, args.metric, use_stemmer=args.rouge_stemmer)
                for task, answer in zip(tasks, answers, strict=True)]  # fmt: skip
        report(args, rows, {**settings, "metric": args.metric, "rouge_stemmer": args.rouge_stemmer,
                            "max_rows": args.max_rows}, model_facts(loaded))  # fmt: skip
    finish_trials(args.output_file)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def report(args: argparse.Namespace, rows: list[dict], settings: dict, facts: dict) -> None:
    """Print the means, write the result file and the plot."""
    summaries, lengths = summarize_tasks(rows), summarize_lengths(rows)
    print(task_table(summaries))
    num_lost = sum(summary["num_rows_without_choice"] for summary in summaries)
    if num_lost:
        print(f"warning: {num_lost} answers name no single option and count as wrong")
    protocol = "greedy answers" if args.choice_scoring == "generation" else "greedy answers, most likely option letter"
    protocol += f", {args.num_shots} examples of --shots_file"
    protocol += f", contexts cut in the middle to {facts['context_size']} tokens with prompt"
    if args.output_file:
        files = [str(path) for path in args.data_path]
        result = {"protocol": protocol, "settings": {"data_path": files, **settings}, **facts}
        write_json(args.output_file, json_safe({**result, "tasks": summaries, "by_length": lengths, "rows": rows}))
        print(f"wrote {args.output_file}")
    if args.plot:
        plot_tasks(summaries, lengths, args.plot)
        print(f"wrote {args.plot}")


def main() -> None:
    args = parse_arguments()
    tasks, shots = check_arguments(args)
    evaluate(args, tasks, shots)


if __name__ == "__main__":
    run_main(main)
