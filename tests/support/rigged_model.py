"""A stand-in for a model, whose answer is a function of the prompt's text; for what asks and scores models."""

import importlib.util
from types import SimpleNamespace

import torch
from conftest import REPO, save_tiny_model

from longqlora.cli import run_main
from longqlora.evaluation.trials import run_trials
from longqlora.inference.source import ModelSource


class RiggedModel:
    """Answers every prompt with `reply(prompt text)`, then ends; keeps the prompts' lengths in tokens."""

    device = torch.device("cpu")
    generation_config = SimpleNamespace(eos_token_id=None)

    def __init__(self, tokenizer, reply):
        self.tokenizer, self.reply, self.lengths = tokenizer, reply, []

    def generate(self, input_ids, generation_config, stopping_criteria, **others):
        self.lengths.append(input_ids.shape[1])
        prompt = self.tokenizer.decode(input_ids[0], skip_special_tokens=True)
        answer = self.tokenizer(self.reply(prompt), add_special_tokens=False)["input_ids"]
        for token_id in [*answer, self.tokenizer.eos_token_id][: generation_config.max_new_tokens]:
            input_ids = torch.cat([input_ids, torch.tensor([[token_id]])], dim=1)
            if stopping_criteria(input_ids, None).all():
                break
        return input_ids


def rigged(tokenizer, reply):
    """What the evaluations need of a `LoadedModel`."""
    return SimpleNamespace(model=RiggedModel(tokenizer, reply), tokenizer=tokenizer)


def load_script(script: str):
    """A script of the repository as a module."""
    spec = importlib.util.spec_from_file_location("script_under_test", REPO / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_main_of(module, arguments, monkeypatch, capsys) -> tuple[int, str, str]:
    """Run a script's main in this process: exit code, stdout, stderr."""
    monkeypatch.setattr("sys.argv", ["script.py", *map(str, arguments)])
    # What the test itself made a library print.
    capsys.readouterr()
    try:
        run_main(module.main)
        code = 0
    except SystemExit as exit_info:
        code = exit_info.code
    return (code, *capsys.readouterr())


def ask_all(task, loaded, *, context_size=64) -> dict:
    """The record of an evaluation's task on a `rigged` model."""
    source = ModelSource(loaded.tokenizer, None, "base", None, context_size)
    parts, options = task.make_trials(source), {"output_file": None, "desc": "", "fingerprint": task.settings}
    task.use(loaded)
    return task.score([result for part in parts for result in run_trials(part, task.ask, **options)])


def save_parrot(folder, tokenizer):
    """Save a model that writes " the" for ever: its layers do nothing and its head knows one token."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(save_tiny_model(folder, tokenizer))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "norm" in name or "embed" in name else 0.0)
        model.lm_head.weight[tokenizer(" the", add_special_tokens=False)["input_ids"][0]] = 1.0
    model.save_pretrained(folder)
    return folder
