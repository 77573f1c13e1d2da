"""Our models in lm-evaluation-harness: the model as it is loaded, a task's data, one task evaluated.

    model = wrap_model(loaded, batch_size=1, max_length=loaded.context_size)
    answers = generate_answers(model, prompts, max_new_tokens=30)
    tasks = load_tasks(["arc_easy"], source)
    metrics = evaluate_tasks(model, "arc_easy", tasks["arc_easy"], num_fewshot=0, limit=100, seed=42)

The model keeps its adapter, attention and device; the harness neither loads nor moves anything. It never splits
work over processes either: every process evaluates whole tasks of its own (component/evaluation/trials.py).

lm_eval is imported where it is used: it is an extra package, and takes seconds.
"""

import logging
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
from jinja2 import TemplateError
from transformers import GenerationConfig, set_seed

from longqlora.distributed import is_main_process, print_main
from longqlora.evaluation.frame import ModelSource
from longqlora.inference.generation import end_token_ids
from longqlora.inference.load import LoadedModel

# HFLM's room for the answers of a task that says nothing.
DEFAULT_ANSWER_TOKENS = 256
NUM_BOOTSTRAP = 1000
NOT_METRICS = ("sample_len", "sample_count")


def new_wording(seen: set[str], record: logging.LogRecord) -> bool:
    """Whether a message is the first of its wording, whatever its numbers: some come once per sample."""
    wording = re.sub(r"\d", "", record.getMessage())
    return wording not in seen and not seen.add(wording)


def quieten() -> None:
    """Leave of lm_eval's messages the errors, and the warnings about a prompt that was cut."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    models = logging.getLogger("lm_eval.models.huggingface")
    models.setLevel(logging.WARNING)
    if not models.filters:
        models.addFilter(partial(new_wording, set()))
    datasets.disable_progress_bars()


def wrap_model(loaded: LoadedModel, *, batch_size: int, max_length: int) -> Any:
    """`loaded` as the harness' HFLM. max_length: tokens of prompt and answer; longer prompts lose their start.

    The sampling defaults of the model's generation config are set aside: a task says how it decodes, and a
    repetition penalty that came with the weights would change greedy answers.
    """
    from lm_eval.models.huggingface import HFLM

    if loaded.tokenizer.eos_token is None:
        raise ValueError("the tokenizer has no EOS token, which lm-eval needs; add one to tokenizer_config.json")
    # Above the level of the warnings that an already loaded model is not moved.
    logging.getLogger("lm_eval.models.huggingface").setLevel(logging.ERROR)
    loaded.tokenizer.model_max_length = max(loaded.tokenizer.model_max_length, max_length)
    loaded.model.generation_config = GenerationConfig(
        bos_token_id=loaded.tokenizer.bos_token_id,
        eos_token_id=end_token_ids(loaded.model, loaded.tokenizer),
        pad_token_id=loaded.tokenizer.pad_token_id,
    )
    # HFLM ties the weights anew, which would put the base's embedding in place of one that an adapter brought.
    loaded.model.tie_weights = lambda *args, **kwargs: None
    try:
        sizes = {"batch_size": batch_size, "max_length": max_length}
        model = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, backend="causal", **sizes)
    finally:
        del loaded.model.tie_weights
    for name in ("generate_until", "loglikelihood", "loglikelihood_rolling"):
        setattr(model, name, partial(getattr(model, name), disable_tqdm=not is_main_process()))
    quieten()
    return model


def generate_answers(model: Any, prompts: Sequence[str], *, max_new_tokens: int) -> list[str]:
    """Greedy answers to `prompts`, raw text that each answer continues, in the given order."""
    from lm_eval.api.instance import Instance

    options = {"do_sample": False, "max_gen_toks": max_new_tokens, "until": []}
    return model.generate_until(
        [Instance("generate_until", {}, (prompt, dict(options)), index) for index, prompt in enumerate(prompts)]
    )


def load_tasks(
    names: Sequence[str],
    source: ModelSource,
    *,
    include_path: Path | None = None,
    lengths: Sequence[int] | None = None,
    max_new_tokens: int | None = None,
) -> dict[str, dict]:
    """Name -> tasks of the harness under it, with their data read; a group or tag has several.

    include_path: folder of the user's own task files, which come before the harness' own. lengths: of samples in
    tokens, for tasks that make their data. max_new_tokens: room for answers; None for the task's own. Raises
    ValueError saying which task, what is missing and what to do.
    """
    from lm_eval.tasks import TaskManager

    quieten()
    given: dict[str, Any] = {"tokenizer": source.tokenizer.name_or_path}
    if lengths:
        given["max_seq_lengths"] = sorted(set(lengths))
    manager = TaskManager(include_path=include_path, include_defaults=False, metadata=given)
    if not all(name in manager.all_tasks for name in names):
        # The index of the harness' own thousands of files takes some ten seconds.
        manager = TaskManager(include_path=include_path, metadata=given)
    sizes = {"max_new_tokens": max_new_tokens, "context_size": source.context_size}
    return {name: load_task(manager, name, **sizes) for name in names}


def load_task(manager: Any, name: str, *, max_new_tokens: int | None, context_size: int) -> dict:
    """The tasks under one name, by the harness' TaskManager, with the room for their answers set; in tokens."""
    if name not in manager.all_tasks:
        where = "here (--list_tasks), in lm-eval (lm_eval ls tasks) or in your own --include_path FOLDER"
        raise ValueError(f"--tasks: no task {name!r} {where}")
    try:
        loaded = manager.load([name])
    except Exception as error:  # Whatever a task file, its code or its data set raises is the user's to know.
        raise ValueError(f"--tasks {name}: {missing(error)}") from error
    for task in loaded["tasks"].values():
        for trait, what in (("UNSAFE_CODE", "runs what the model writes, which is refused here"),
                            ("MULTIMODAL", "needs images or sound, which these models cannot read")):  # fmt: skip
            if getattr(task, trait, False):
                raise ValueError(f"--tasks {name}: it {what}; leave it out")
        if task.get_config("output_type") == "generate_until":
            if max_new_tokens is not None:
                task.set_config(key="generation_kwargs", value={"max_gen_toks": max_new_tokens}, update=True)
            room = (task.get_config("generation_kwargs") or {}).get("max_gen_toks", DEFAULT_ANSWER_TOKENS)
            if room >= context_size:
                raise ValueError(
                    f"--tasks {name}: answers of {room} tokens do not fit a context of {context_size}; give "
                    "--max_new_tokens or a longer --context_size"
                )
    return loaded


def missing(error: Exception) -> str:
    """What a task lacks, and what to do, from the exception that loading it raised."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, ImportError):
        return f"its data needs a package that is not installed ({text}); install it, or take another task"
    offline = ("Couldn't reach", "offline", "Offline", "Connection", "connection", "Name or service", "Max retries")
    if isinstance(error, ConnectionError) or any(word in text for word in offline):
        return (
            f"its data is not on this machine and the hub cannot be reached ({text}); run it once where there is a "
            "network (HF_HOME holds the data), or give a task with local data through --include_path"
        )
    return f"lm-eval cannot load it ({type(error).__name__}: {text}); fix the task file or its data"


def data_state(tasks: dict) -> dict:
    """What tells one state of the tasks' data from another: sizes and fingerprints of the data sets."""
    return {
        name: [len(task.eval_docs), str(getattr(task.eval_docs, "_fingerprint", "")), task.OUTPUT_TYPE]
        for name, task in tasks["tasks"].items()
    }


def evaluate_tasks(
    model: Any, name: str, tasks: dict, *, num_fewshot: int | None, limit: int | None, seed: int
) -> dict:
    """Metrics of one entry of `load_tasks`, ready for JSON: {"metrics": {task: {metric: value}}, "num_samples": ...}.

    num_fewshot: examples before each question; None for the task's own number, and a task that fixes it at 0
    keeps that. limit: samples per task; None for all.
    """
    from lm_eval.evaluator import evaluate

    # numpy takes no larger one.
    set_seed(seed % 2**32)
    for task_name, task in tasks["tasks"].items():
        own = task.get_config("num_fewshot")
        if num_fewshot and own == 0:
            print_main(f"warning: {task_name} fixes its number of examples at 0; --num_fewshot does not change it")
        elif num_fewshot is not None or own is None:
            task.set_config(key="num_fewshot", value=num_fewshot or 0)
        task.set_fewshot_seed(seed=seed)
    try:
        results = evaluate(lm=model, task_dict=tasks, limit=limit, bootstrap_iters=NUM_BOOTSTRAP, log_samples=False)
    except (AssertionError, LookupError, TypeError, TemplateError) as error:
        # So end mistakes in a task file: a field that is not in the data, a few-shot split that is too small.
        raise ValueError(f"--tasks {name}: lm-eval cannot run it ({type(error).__name__}: {error})") from error
    metrics = {
        task: {name: float(value) for name, value in row.items()
               if isinstance(value, (int, float)) and name not in NOT_METRICS}
        for task, row in {**results["results"], **results.get("groups", {})}.items()
    }  # fmt: skip
    return {"metrics": metrics, "num_samples": {task: n["effective"] for task, n in results["n-samples"].items()}}
