"""RULER and a user's own tasks asked through lm-eval: a model that knows the answers, missing data, bad task files."""

import json
import os

import pytest
import torch
from conftest import save_tiny_model, tiny_config
from peft import LoraConfig, get_peft_model
from rigged_model import ask_all
from test_ruler import solve

from longqlora.cli import go_offline_unless_reachable
from longqlora.evaluation.harness import fit_answers, load_task, wrap_model
from longqlora.evaluation.ruler.task import Ruler
from longqlora.evaluation.ruler.tasks import TASKS
from longqlora.inference.load import load_for_inference


@pytest.mark.parametrize(("knows", "score"), [(True, 100), (False, 0)])
def test_a_model_that_knows_scores_all(tiny_model_dir, tmp_path, knows, score):
    loaded = load_for_inference(str(tiny_model_dir))
    tokenizer = loaded.tokenizer

    def generate(input_ids, attention_mask, max_length, **_):
        assert max_length - input_ids.shape[1] in (30, 128), "the room of vt, and of the needles"
        prompts = [tokenizer.decode(row[mask.bool()], skip_special_tokens=True)
                   for row, mask in zip(input_ids, attention_mask, strict=True)]  # fmt: skip
        answers = [" ".join(solve(prompt)) if knows else "no idea" for prompt in prompts]
        ids = tokenizer(answers, add_special_tokens=False, padding=True, return_tensors="pt").input_ids
        return torch.cat([input_ids, ids], dim=1)

    loaded.model.generate = generate
    (tmp_path / "ä.txt").write_text("One text. Another one.")
    options = {"lengths": [2048, 1800, 1800], "num_samples": 3, "batch_size": 2, "haystack": [tmp_path / "ä.txt"]}
    record = ask_all(Ruler(["niah_multiquery", "vt"], **options), loaded)
    assert [(r["task"], r["length"], r["score"], r["haystack"]) for r in record["results"]] == [
        (task, length, score, haystack)
        for task, haystack in (("niah_multiquery", "text"), ("vt", "noise")) for length in (1800, 2048)
    ]  # fmt: skip
    assert record["mean"] == {1800: score, 2048: score}
    assert record["settings"]["haystack"]["files"] == ["ä.txt"]


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")


@pytest.fixture
def own_tasks(tmp_path):
    """Folder of a user's own task files with local data, one of them with data of the hub."""
    folder = tmp_path / "tässks"
    folder.mkdir()
    rows = [{"q": f"{number} or more? ", "answer": number % 2} for number in range(6)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    common = "test_split: test\noutput_type: multiple_choice\ndoc_to_text: q\ndoc_to_choice: ['yes', 'no']\n"
    local = f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {folder / 'rows.jsonl'}\n"
    (folder / "own.yaml").write_text(f"task: own_task\n{local}{common}doc_to_target: answer\n", encoding="utf-8")
    (folder / "broken.yaml").write_text(f"task: broken\n{local}{common}doc_to_target: '{{{{no_such_field}}}}'\n")
    (folder / "hub.yaml").write_text(f"task: hub_task\ndataset_path: cais/mmlu\n{common}doc_to_target: answer\n")
    generate = common.replace("multiple_choice", "generate_until").replace("doc_to_choice: ['yes', 'no']\n", "")
    (folder / "long.yaml").write_text(f"task: long_answers\n{local}{generate}doc_to_target: answer\n")
    return folder


def test_own_lm_eval_task(evaluate, own_tasks, tiny_model_dir, tmp_path):
    output = tmp_path / "r.json"
    code, out, err = evaluate("ruler", "--model_name_or_path", tiny_model_dir, "--tasks", "own_task", "--include_path",
                              own_tasks, "--limit", 4, "--num_fewshot", 1, "--output_file", output)  # fmt: skip
    assert code == 0 and "own_task  acc,none" in out, err
    (result,) = json.loads(output.read_text())["results"]
    assert result["num_samples"] == {"own_task": 4}
    assert result["metrics"]["own_task"]["acc,none"] in (0, 0.25, 0.5, 0.75, 1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hub_task", r"hub_task: its data is not on this machine .*cais/mmlu.*run it once where"),
        ("broken", r"broken: lm-eval cannot load it \(UndefinedError: .*no_such_field"),
        ("long_answers", r"long_answers: answers of 256 tokens do not fit a context of 64"),
        ("nowhere", r"no task 'nowhere' here .* or in lm-eval"),
    ],
)
def test_tasks_that_cannot_be_run_are_told_before_the_model_loads(own_tasks, name, message):
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=own_tasks, include_defaults=False)
    with pytest.raises(ValueError, match=message) as caught:
        fit_answers(name, load_task(manager, name, own_tasks), max_new_tokens=None, context_size=64)
    assert "\n" not in str(caught.value)


def test_wrapping_leaves_the_model_alone(tmp_path, tiny_tokenizer):
    config = tiny_config(tie_word_embeddings=True)
    loaded = load_for_inference(save_tiny_model(tmp_path / "tied", tiny_tokenizer, config))
    loaded.model = get_peft_model(loaded.model, LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"]))
    loaded.model.get_input_embeddings().weight.data += 0.5
    loaded.model.generation_config.repetition_penalty = 1.5
    ids = torch.arange(5, 25)[None]
    before = loaded.model.eval()(input_ids=ids).logits
    model = wrap_model(loaded, batch_size=1, max_length=64)
    assert model.model is loaded.model and torch.equal(loaded.model(input_ids=ids).logits, before)
    assert (model.rank, model.world_size, model.max_length) == (0, 1, 64)
    assert loaded.model.generation_config.repetition_penalty in (None, 1.0)
    assert 2 in loaded.model.generation_config.eos_token_id


@pytest.mark.parametrize(
    ("given", "proxies", "found"),
    [({"HF_HUB_OFFLINE": "0"}, {}, "0"), ({}, {}, "1"), ({}, {"https": "http://127.0.0.1:1"}, None)],
)
def test_hub_is_given_up_where_nothing_answers(given, proxies, found, monkeypatch):
    """What the user set stays, and behind a proxy the hub is taken to answer."""
    monkeypatch.setattr("urllib.request.getproxies", lambda: proxies)
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    monkeypatch.setattr("os.environ", {**environment, "HF_ENDPOINT": "https://127.0.0.1:9/x", **given})
    go_offline_unless_reachable()
    assert os.environ.get("HF_HUB_OFFLINE") == found


def test_tasks_are_listed(evaluate):
    code, out, _ = evaluate("ruler", "--list_tasks")
    assert code == 0 and [line.split()[0] for line in out.splitlines()[1:]] == list(TASKS)
