"""What all evaluation scripts promise: results, one line for bad input, resuming, several processes."""

import importlib.util
import json
import os
from functools import reduce

import numpy as np
import pytest
from conftest import REPO
from script_process import start_world

from longqlora.data.token_file import write_token_file
from longqlora.evaluation import trials

QUESTION = {"context": "the quick brown fox", "question": "What is quick?", "answers": ["fox"]}
CHOICE = {"context": "the quick brown fox", "question": "Who?", "options": ["dog", "fox"], "answer": "B"}
COMMANDS = {
    "evaluate": "--base_model {model} --seq_len 16 --sliding_window 8 --data_path {folder}/ids.bin",
    "passkey": "--model_name_or_path {model} --num_trials 1 --lengths 300",
    "needle": "--model_name_or_path {model} --haystack {folder}/text.txt --lengths 300",
    "ruler": "--model_name_or_path {model}",
    "longtask": "--model_name_or_path {model} --data_path {folder}/qa.jsonl",
    "compare": "--compare_args_file {folder}/compare.yaml",
}
# Script and what is special: more arguments, what is printed, values of the result file (... for any).
RUNS = {
    "evaluate": (
        "--seq_len 32 128 32 --sliding_window 16 --batch_size 2 --max_windows 3 --context_size -1",
        ["length 128 is beyond the model's context of 64", " 7 windows skipped; ", "loss ", "accuracy 0"],
        {"results.0.seq_len": 32, "results.1.seq_len": 128, "results.1.num_windows": 3, "results.0.sliding_window": 16,
         "results.0.attention": "dense causal (sdpa)", "results.0.dtype": "float32", "results.0.context_size": 64}
        | {f"results.0.{key}": ... for key in (
            "perplexity", "loss", "accuracy", "num_tokens", "protocol", "versions.torch", "loss_by_position.0.loss",
            "data_file", "data_sha256", "base_model", "peft_model", "rope_parameters")},
    ),
    "evaluate, stretched": (
        "--context_size 128 --seq_len 100 --sliding_window 60 --dtype bf16",
        ["protocol: longlora: "],
        {"rope_parameters.factor": 2.0, "context_size": 128, "dtype": "bfloat16", "loss": ..., "results.0.loss": ...},
    ),
    "passkey": (
        "--lengths 300 330 --depths 0 1 0 --num_trials 2",
        ["warning: length 300 is beyond the model's context of 64 tokens", "depth  300  330", " mean"],
        {"protocol.num_digits": 5, "context_size": 64, "versions.torch": ..., "cells.3.length": 330,
         "cells.3.accuracy": ..., "trials.7.key": ...},
    ),
    "needle": (
        "--lengths 300 330 --depths 0 1 --needle Needles. --question Who? --max_new_tokens 4",
        ["note: length 300: the haystack is shorter and was used ", "depth  300  330"],
        {"protocol.answer": "Needles.", "protocol.template": "none", "cells.1.depth": 1, "cells.3.score": ...,
         "haystack_files.0": ..., "context_size": 64},
    ),
    "ruler": (
        "--tasks niah_single_1 fwe --lengths 700 640 700 --num_samples 1 --max_new_tokens 8",
        ["length 640 is beyond the model's context of 64", "score ", "mean "],
        {"results.0.task": "niah_single_1", "results.0.length": 640, "results.3.length": 700, "mean.700": ...,
         "settings.seed": 42, "settings.lm_eval": ..., "versions.torch": ..., "results.0.answers.0.answer": ...},
    ),
    "longtask": (
        "--data_path {folder}/qa.jsonl {folder}/exam.jsonl --max_rows 3 --context_size 400 --max_new_tokens 4",
        ["task  metric     score  rows  cut", "exam  accuracy"],
        {"tasks.1.num_rows": 2, "by_length.0.score": ..., "rows.1.right_choice": "B", "settings.metric": "auto",
         "settings.prompt_template": "none", "versions.torch": ..., "context_size": 400, "rope_parameters": ...},
    ),
    "longtask, with an example": (
        "--data_path {folder}/qa.jsonl {folder}/exam.jsonl --max_rows 2 --context_size 120 "
        "--max_new_tokens 6 --num_shots 1 --shots_file {folder}/shots.jsonl",
        ["task  metric     score  rows  cut", "exam  accuracy"],
        {"rows.0.task": "qa", "rows.0.metric": "f1", "rows.0.num_new_tokens": 6, "rows.1.choice": ...,
         "rows.1.id": "1", "settings.num_shots": 1},
    ),
    "compare": (
        "--max_windows 3",
        ["perplexity, longlora protocol, stride 30, dtype auto", "method "],
        {"results.PI.100.loss": ..., "models.PI.100.context_size": 100, "settings.max_windows": 3,
         "versions.torch": ...},
    ),
    "compare, passkey": (
        "--compare_args_file {folder}/passkey.yaml",
        ["passkey accuracy in percent, 1 keys at each of 2 depths\nmethod  300\nnone "],
        {"results.PI.0.depth": 0, "results.PI.1.depth": 1, "results.PI.1.accuracy": ...},
    ),
}  # fmt: skip
# The least value of flags that are numbers.
LEAST = {
    "evaluate": {"sliding_window": 1, "batch_size": 1, "max_windows": 1, "prefill_chunk_size": 1, "context_size": 1},
    "passkey": {"num_depths": 1, "num_trials": 1, "lengths": 1},
    "needle": {"max_new_tokens": 1},
    "ruler": {"num_samples": 1, "max_new_tokens": 1, "num_fewshot": 0, "limit": 1, "seed": 0, "batch_size": 1,
              "lengths": 1},
    "longtask": {"max_rows": 1, "max_new_tokens": 1, "num_shots": 0},
}  # fmt: skip
# Arguments, by spaces, and a part of the message.
BAD = {
    "evaluate": [
        ("--seq_len 200", "needs at least 209 "),
        ("--seq_len 1", "seq_len must be at least 2"),
        ("--protocol stride --sliding_window 16", "at most 15"),
        ("--data_path absent.bin", "--data_path: no file at 'absent.bin'"),
        ("--data_dtype uint32", "no multiple of 4"),
        ("--data_path {folder}/two.bin --protocol stride", "has 1 token; the stride protocol needs at least 2"),
        ("--data_path {folder}/high.bin", "id 320 at position 3 is outside the vocabulary of 320"),
        ("--data_path {folder}/changed.bin", "is not the file that changed.bin.json describes"),
        ("--base_model /absent/model", "no model folder at '/absent/model'"),
        ("--peft_model /absent/adapter", "no folder at '/absent/adapter'"),
        ("--base_model nobody/nothing", "nobody/nothing"),
        ("--flash_attn", "--flash_attn: the flash_attn package is not installed"),
    ],
    "passkey": [
        ("--model_name_or_path=", "--model_name_or_path: give a model"),
        ("--lengths 40", "length 40 is too short for needle and question"),
        ("--depths nan", "--depths: must be between 0"),
        ("--num_digits 0", "--num_digits: must be between 1 and 50, got 0"),
    ],
    "needle": [
        ("--haystack absent.txt", "--haystack: no file at 'absent.txt'"),
        ("--haystack .", "--haystack: no .txt file in the folder '.'"),
        ("--haystack {model}/model.safetensors", "--haystack: "),
        ("--haystack {folder}/nul.txt", "is a binary file"),
        ("--answer ...", "--answer: '...' has no word"),
        ("--answer=", "--answer: is empty"),
        ("--needle \ud800", "--needle has half of a surrogate pair"),
        ("--needle Needles.", "--question: your own --needle"),
        ("--prompt_template chat_template", "the tokenizer has no chat template"),
        ("--lengths 30", "length 30 is too short for needle and question"),
    ],
    "ruler": [
        ("--tasks niah_single_2", "niah_single_2: its haystack are essays"),
        ("--lengths 200", "--lengths 200: niah_single_1 needs at least"),
        ("--haystack {folder}/empty.txt", "--haystack: the files hold no text"),
        ("--include_path {folder}/empty.txt --tasks mmlu", "--include_path: no folder"),
        ("--plot x.png --tasks mmlu", "--plot draws RULER's scores"),
        ("--limit 2", "--limit is for lm-eval's tasks, and --tasks names none"),
        ("--tasks vt --num_fewshot 0", "--num_fewshot is for lm-eval's tasks"),
        ("--tasks mmlu --lengths 512", "--lengths is for RULER's tasks"),
    ],
    "longtask": [
        ("--data_path nowhere.jsonl", "--data_path: no file at 'nowhere.jsonl'"),
        ("--data_path {folder}/blank.jsonl", "holds no rows"),
        ("--data_path {folder}/qa.jsonl {folder}/binary.txt", "binary.txt line 1: not UTF-8"),
        ("--metric accuracy", "--metric: question 1 of qa has no options for accuracy"),
        ("--data_path {folder}/accurate.jsonl", "--metric: question 1 of accurate has no options for accuracy"),
        ("--max_new_tokens 64", "question 1 of qa: ... 0 fit in the context of 64 beside --max_new_tokens 64"),
        ("--max_new_tokens 56", "question 1 of qa: "),
        ("--shots_file {folder}/qa.jsonl", "--num_shots and --shots_file go together"),
        ("--max_new_tokens 4 --num_shots 1 --shots_file {folder}/qa.jsonl", "--num_shots 1: --shots_file has 1 "),
        ("--max_new_tokens 4 --prompt_template chat_template", "no chat template"),
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_model_dir):
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "text.txt").write_text("A one.")
    (folder / "empty.txt").touch()
    (folder / "nul.txt").write_bytes(b"a\0b")
    (folder / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (folder / "blank.jsonl").write_text("\n")
    for name, rows in (("qa", [QUESTION]), ("exam", [CHOICE, {**CHOICE, "answer": "A"}, QUESTION, CHOICE]),
                       ("shots", [{"question": "Who are you?", "answer": "me"}]),
                       ("others", [{"question": "Who are you?", "answer": "you"}]),
                       ("accurate", [{**QUESTION, "metric": "accuracy"}])):  # fmt: skip
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    np.random.default_rng(0).integers(4, 320, 203).astype("<u2").tofile(folder / "ids.bin")
    np.array([1, 2, 3, 320] + [5] * 40, dtype="<u2").tofile(folder / "high.bin")
    (folder / "two.bin").write_bytes(bytes(2))
    write_token_file(folder / "changed.bin", [range(4, 204)], tokenizer_name="tiny", vocab_size=320)
    (folder / "changed.bin").write_bytes((folder / "changed.bin").read_bytes()[::-1][::2] * 2)
    methods = f"base_model: {tiny_model_dir}\nmethods: {{none: {{}}, PI: {{rope_type: linear}}}}\n"
    (folder / "compare.yaml").write_text(
        f"{methods}lengths: [64, 100]\ndata_path: {folder / 'ids.bin'}\nsliding_window: 30\n"
    )
    (folder / "passkey.yaml").write_text(f"{methods}measure: passkey\nlengths: [300]\nnum_trials: 1\nnum_depths: 2\n")
    return folder


@pytest.fixture
def run(evaluate, tiny_model_dir, folder, tmp_path, monkeypatch):
    """run("passkey", "--seed 1"): a script with more arguments than its command's, in an empty working directory."""
    # Nothing of a test may ask the hub, or set for good that it is not asked.
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.chdir(tmp_path)

    def command(script: str, *arguments: str) -> tuple[int, str, str]:
        words = " ".join([COMMANDS[script], *arguments]).format(model=tiny_model_dir, folder=folder).split()
        return evaluate(script, *words)

    return command


@pytest.mark.parametrize("case", RUNS)
def test_results_are_printed_written_and_drawn(case, run, tmp_path):
    arguments, printed, values = RUNS[case]
    code, out, err = run(case.split(",")[0], arguments, "--output_file new/r.json --plot new/r.png")
    assert code == 0, err
    assert [text for text in printed if text not in out] == [], out
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["r.json", "r.png"]
    assert (tmp_path / "new/r.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((tmp_path / "new/r.json").read_text(encoding="utf-8"))

    def value(path):
        return reduce(lambda part, key: part[int(key) if isinstance(part, list) else key], path.split("."), record)

    found = {path: value(path) for path in values}
    assert {path: ... if values[path] is ... else found[path] for path in values} == values


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [(script, *case) for script, cases in BAD.items() for case in cases]
    + [(script, f"--{name} {least - 1}", f"{name}: ... at least {least}")
       for script, of in LEAST.items() for name, least in of.items()],
)  # fmt: skip
def test_bad_input_is_one_line(script, arguments, message, run, tmp_path, monkeypatch):
    if arguments == "--flash_attn" and importlib.util.find_spec("flash_attn"):
        pytest.skip("flash_attn is installed")
    monkeypatch.setattr("longqlora.evaluation.frame.load_from_arguments", lambda args: pytest.fail("weights loaded"))
    code, _, stderr = run(script, arguments)
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(errors) == 1 and all(part in errors[0] for part in message.split(" ... ")), stderr
    assert stderr.endswith(errors[0] + "\n") and "Traceback" not in stderr and list(tmp_path.iterdir()) == []


class Killed(BaseException):
    pass


@pytest.fixture
def asked(run, monkeypatch):
    """asked(script, *arguments, killed_after=2): the trials that the model was asked, and stdout of a whole run."""

    def command(script: str, *arguments: str, killed_after: int | None = None) -> tuple[list, str]:
        done, attempt = [], trials.attempt

        def counted(run_one, trial):
            if len(done) == killed_after:
                raise Killed
            done.append(trial)
            return attempt(run_one, trial)

        with monkeypatch.context() as patch:
            patch.setattr(trials, "attempt", counted)
            try:
                code, out, err = run(script, *arguments)
            except Killed:
                return done, ""
        assert code == 0 and killed_after is None, err
        return done, out

    return command


@pytest.mark.parametrize("script", COMMANDS)
def test_a_killed_run_goes_on_and_gives_the_identical_result(script, asked, tmp_path):
    arguments = RUNS[script][0]
    done, _ = asked(script, arguments, "--output_file whole.json")
    asked(script, arguments, "--output_file resumed.json", killed_after=len(done) - 2)
    assert not (tmp_path / "resumed.json").exists()
    [partial] = tmp_path.glob(".resumed.json.trials-*.jsonl")
    if script == "evaluate":
        assert partial.stat().st_size < 2500 * len(done), "64 sums a window, not the loss of every position"
    # A kill cut the last line short, and another process had been at work.
    partial.write_bytes(partial.read_bytes()[:-20])
    (tmp_path / ".resumed.json.trials-7.jsonl").write_bytes(partial.read_bytes()[:300])
    again, out = asked(script, arguments, "--output_file resumed.json")
    assert again == done[-3:] and "resuming: " in out
    assert json.loads((tmp_path / "resumed.json").read_text()) == json.loads((tmp_path / "whole.json").read_text())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["resumed.json", "whole.json"]


SHOTS = "--context_size 400 --max_new_tokens 4 --num_shots 1 --shots_file {folder}/"
OTHERS = [
    *(("evaluate", "", change) for change in (
        "--sliding_window 9", "--protocol stride --sliding_window 9", "--max_windows 3", "--dtype bf16")),
    ("passkey", "", "--context_size 128"),
    ("needle", "", "--max_new_tokens 9"),
    ("needle", "", "--haystack {folder}/blank.jsonl {folder}/shots.jsonl"),
    ("ruler", RUNS["ruler"][0], "--num_samples 2"),
    ("longtask", f"{SHOTS}shots.jsonl --data_path {{folder}}/exam.jsonl", f"{SHOTS}others.jsonl"),
]  # fmt: skip


@pytest.mark.parametrize(("script", "arguments", "change"), OTHERS)
def test_other_arguments_start_anew(script, arguments, change, asked, capsys):
    asked(script, arguments, "--output_file r.json", killed_after=1)
    asked(script, arguments, change, "--output_file r.json", killed_after=0)
    assert "partial results of other arguments found; starting anew" in capsys.readouterr().out


@pytest.mark.parametrize("script", ["evaluate", pytest.param("ruler", marks=pytest.mark.slow)])
def test_two_processes_give_the_bits_of_one(script, tiny_model_dir, folder, tmp_path, run_script):
    path, log = f"script/evaluate/{script}.py", tmp_path / "log"
    words = f"{COMMANDS[script]} {RUNS[script][0]} --output_file".format(model=tiny_model_dir, folder=folder).split()
    run_script(path, *words, tmp_path / "one.json", check=True)
    ranks = start_world([REPO / path, *words, tmp_path / "two.json"], [os.devnull, log, log], num_processes=2)
    for process in ranks:
        process.join(120)
    assert [process.exitcode for process in ranks] == [0, 0], log.read_text()
    assert log.read_text().count("wrote") == 1
    assert json.loads((tmp_path / "one.json").read_text()) == json.loads((tmp_path / "two.json").read_text())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "one.json", "two.json"]
