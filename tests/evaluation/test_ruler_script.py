"""The RULER script and lm-eval around our models: a rigged model, resuming, own tasks, missing data, bad input."""

import json
import os
import re
import subprocess
import sys

import pytest
from conftest import REPO, save_tiny_model, tiny_config
from test_ruler import solve

from longqlora.cli import go_offline_unless_reachable
from longqlora.evaluation.ruler.tasks import TASKS


@pytest.fixture
def ruler(evaluate, monkeypatch):
    """`main` of the script in this process: ruler(*arguments) -> stdout."""
    monkeypatch.setenv("TQDM_DISABLE", "1")

    def run(*arguments):
        code, out, err = evaluate("ruler", *arguments)
        assert code == 0, err
        return out

    return run


def rig(loaded, answer_of, seen: list):
    """Make `loaded` answer prompts with `answer_of`."""
    import torch

    def generate(input_ids, attention_mask, max_length, **_):
        prompts = [
            loaded.tokenizer.decode(row[mask.bool()], skip_special_tokens=True)
            for row, mask in zip(input_ids, attention_mask, strict=True)
        ]
        seen.extend(prompts)
        assert max_length - input_ids.shape[1] in (9, 30, 128), "the room of vt, of the needles, or the one asked for"
        answers = [loaded.tokenizer(answer_of(prompt), add_special_tokens=False).input_ids for prompt in prompts]
        width = max(map(len, answers))
        rows = [ids + [loaded.tokenizer.eos_token_id] * (width - len(ids)) for ids in answers]
        return torch.cat([input_ids, torch.tensor(rows)], dim=1)

    loaded.model.generate = generate
    return loaded


@pytest.fixture
def rigged(tiny_model_dir, monkeypatch):
    """rigged(answer_of) -> the prompts that the script's model will have seen."""

    def apply(answer_of) -> list:
        from longqlora.inference.load import load_for_inference

        seen = []
        loaded = rig(load_for_inference(str(tiny_model_dir)), answer_of, seen)
        monkeypatch.setattr("longqlora.evaluation.frame.load_from_arguments", lambda args: loaded)
        return seen

    return apply


def test_a_model_that_knows_scores_all_and_a_killed_run_goes_on(ruler, rigged, tiny_model_dir, tmp_path):
    output, plot = tmp_path / "out" / "r.json", tmp_path / "r.svg"
    arguments = ["--model_name_or_path", tiny_model_dir, "--tasks", "niah_multiquery", "vt", "--lengths", 2048, 1800,
                 1800, "--num_samples", 3, "--batch_size", 2, "--output_file", output, "--plot", plot]  # fmt: skip
    told = []

    def die_at_the_third_cell(prompt):
        told.append(prompt)
        if len(told) > 7:
            raise RuntimeError("killed")
        return " ".join(solve(prompt))

    rigged(die_at_the_third_cell)
    with pytest.raises(RuntimeError, match="killed"):
        ruler(*arguments)
    assert not output.exists()
    seen = rigged(lambda prompt: " ".join(solve(prompt)))
    out = ruler(*arguments)
    assert "resuming: 2 of 4" in out and "beyond the model's context of 64" in out
    assert len(seen) == 6 and all("Memorize and track" in prompt for prompt in seen)
    record = json.loads(output.read_text())
    assert [(r["task"], r["length"], r["score"]) for r in record["results"]] == [
        (task, length, 100) for task in ("niah_multiquery", "vt") for length in (1800, 2048)
    ]
    assert record["mean"] == {"1800": 100, "2048": 100}
    assert record["settings"]["seed"] == 42 and record["settings"]["lm_eval"] and record["versions"]["torch"]
    assert record["results"][0]["answers"][0]["answer"].strip()
    assert [path.name for path in output.parent.iterdir()] == ["r.json"] and b"<svg" in plot.read_bytes()
    rigged(lambda prompt: "no idea")
    (tmp_path / "ä.txt").write_text("One text. Another one.")
    out = ruler(*arguments[:5], "--lengths", 1800, "--num_samples", 1, "--max_new_tokens", 9, "--haystack",
                tmp_path / "ä.txt", "--output_file", output)  # fmt: skip
    assert re.search(r"niah_multiquery +0\.0", out)
    record = json.loads(output.read_text())
    assert record["settings"]["haystack"]["files"] == ["ä.txt"] and record["results"][0]["haystack"] == "text"


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


def test_own_lm_eval_task(ruler, own_tasks, tiny_model_dir, tmp_path):
    output = tmp_path / "r.json"
    out = ruler("--model_name_or_path", tiny_model_dir, "--tasks", "own_task", "--include_path", own_tasks, "--limit",
                4, "--num_fewshot", 1, "--output_file", output)  # fmt: skip
    (result,) = json.loads(output.read_text())["results"]
    assert result["num_samples"] == {"own_task": 4}
    assert result["metrics"]["own_task"]["acc,none"] in (0, 0.25, 0.5, 0.75, 1)
    assert "own_task  acc,none" in out


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

    from longqlora.evaluation.harness import check_fit, load_task

    manager = TaskManager(include_path=own_tasks, include_defaults=False)
    with pytest.raises(ValueError, match=message) as caught:
        check_fit(name, load_task(manager, name, own_tasks), context_size=64)
    assert "\n" not in str(caught.value)


def test_wrapping_leaves_the_model_alone(tmp_path, tiny_tokenizer):
    import torch
    from peft import LoraConfig, get_peft_model

    from longqlora.evaluation.harness import wrap_model
    from longqlora.inference.load import load_for_inference

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


def test_hub_is_given_up_where_nothing_answers(monkeypatch):
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "no_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "https://127.0.0.1:9/x")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "0")
    for said, proxy, expected in (("0", "", "0"), (None, "http://127.0.0.1:1", None), (None, "", "1")):
        monkeypatch.setenv("HF_HUB_OFFLINE", said) if said else monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        monkeypatch.setenv("https_proxy", proxy)
        go_offline_unless_reachable()
        assert os.environ.get("HF_HUB_OFFLINE") == expected


def test_tasks_are_listed(ruler):
    lines = ruler("--list_tasks").splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(TASKS)


@pytest.mark.slow
def test_two_processes_give_the_same_results(tiny_model_dir, own_tasks, tmp_path):
    results = []
    for launcher in ([], ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]):
        output = tmp_path / f"{len(launcher)}.json"
        command = [sys.executable, *launcher, REPO / "script/evaluate/ruler.py", "--model_name_or_path", tiny_model_dir,
                   "--tasks", "niah_single_1", "fwe", "own_task", "--include_path", own_tasks, "--lengths", "640",
                   "--num_samples", "2", "--max_new_tokens", "8", "--output_file", output]  # fmt: skip
        outcome = subprocess.run(list(map(str, command)), capture_output=True, text=True,
                                 env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
        assert outcome.returncode == 0, outcome.stderr[-2000:]
        assert outcome.stdout.count("wrote") == 1
        results.append(json.loads(output.read_text())["results"])
    assert results[0] == results[1] and len(results[0]) == 3
