"""What the evaluation scripts refuse: one line each, before any weights are loaded, and nothing is written."""

import importlib.util
import json

import numpy as np
import pytest

from longqlora.data.token_file import write_token_file

ROW = {"context": "the quick brown fox", "question": "What is quick?", "answers": ["fox"]}
DEFAULTS = {
    "evaluate": "--base_model {model} --seq_len 16 --sliding_window 8 --data_path {folder}/ids.bin",
    "passkey": "--model_name_or_path {model} --num_trials 1 --lengths 300",
    "needle": "--model_name_or_path {model} --haystack {folder}/text.txt --lengths 300",
    "ruler": "--model_name_or_path {model}",
    "longtask": "--model_name_or_path {model} --data_path {folder}/qa.jsonl",
}
# Arguments, by spaces, and a part of the message.
BAD = {
    "evaluate": [
        ("--seq_len 200", "needs at least 209 "),
        ("--seq_len 16 500", "needs at least 509 "),
        ("--seq_len 1", "seq_len must be at least 2"),
        ("--sliding_window 0", "must be at least 1, not 0"),
        ("--protocol stride --sliding_window 16", "at most 15"),
        ("--batch_size 0", "batch_size must be at least 1"),
        ("--max_windows 0", "max_windows must be at least 1"),
        ("--prefill_chunk_size 0", "--prefill_chunk_size: must be at least 1"),
        ("--context_size 0", "--context_size: must be at least 1"),
        ("--data_path absent.bin", "--data_path: no file at 'absent.bin'"),
        ("--data_dtype uint32 --data_path {folder}/two.bin", "no multiple of 4"),
        ("--data_path {folder}/odd.bin", "no multiple of 2"),
        ("--data_path {folder}/empty.txt", "is empty"),
        ("--data_path {folder}/high.bin", "id 320 at position 3 is outside the vocabulary of 320"),
        ("--data_path {folder}/changed.bin", "is not the file that changed.bin.json describes"),
        ("--base_model /absent/model", "no model folder at '/absent/model'"),
        ("--peft_model /absent/adapter", "no folder at '/absent/adapter'"),
        ("--base_model nobody/nothing", "nobody/nothing"),
        ("--flash_attn", "--flash_attn: the flash_attn package is not installed"),
        ("--plot x.doc", "must end in one of .png"),
        ("--output_file .", "is a folder"),
    ],
    "passkey": [
        ("--model_name_or_path=", "--model_name_or_path: give a model"),
        ("--lengths 0", "--lengths: must be at least 1 token"),
        ("--lengths 40", "length 40 is too short for a passkey prompt"),
        ("--depths nan", "--depths: must be between 0"),
        ("--depths 0.5 1.01", "--depths: must be between 0 (start) and 1 (end), got 1.01"),
        ("--depths -0.1", "--depths: must be between 0"),
        ("--num_depths 0", "--num_depths: must be at least 1, got 0"),
        ("--num_trials -1", "--num_trials: must be at least 1"),
        ("--num_digits 0", "--num_digits: must be between 1 and 50, got 0"),
        ("--num_digits 51", "--num_digits"),
        ("--plot map.txt", "--plot: 'map.txt' must end in"),
        ("--plot /proc/absent/map.png", "--plot: cannot write"),
        ("--output_file .", "--output_file: '.' is a folder"),
        ("--output_file /proc/absent/out.json", "--output_file: cannot write"),
        ("--model_name_or_path /absent/model", "/absent/model"),
    ],
    "needle": [
        ("--haystack absent.txt", "--haystack: no file at 'absent.txt'"),
        ("--haystack .", "--haystack: no .txt file in the folder '.'"),
        ("--haystack {folder}/empty.txt", "--haystack: the files hold no text"),
        ("--haystack {model}/model.safetensors", "--haystack: "),
        ("--haystack {folder}/nul.txt", "is a binary file"),
        ("--answer ...", "--answer: '...' has no word"),
        ("--answer=", "--answer: is empty"),
        ("--needle=", "--needle: is empty"),
        ("--question=", "--question: is empty"),
        ("--needle \ud800", "--needle: is not valid Unicode"),
        ("--needle Needles.", "--question: your own --needle"),
        ("--max_new_tokens 0", "--max_new_tokens: must be at least 1"),
        ("--prompt_template chat_template", "the tokenizer has no chat template"),
        ("--lengths 30", "length 30 is too short for needle and question"),
        ("--depths 2", "--depths: must be between 0"),
    ],
    "ruler": [
        ("--tasks niah_single_2", "niah_single_2: its haystack are essays"),
        ("--num_samples 0", "--num_samples: must be at least 1"),
        ("--lengths 512 0", "--lengths: must be at least 1 token, got 0"),
        ("--lengths 200", "--lengths 200: niah_single_1 needs at least"),
        ("--max_new_tokens 0", "--max_new_tokens: must be at least 1"),
        ("--tasks mmlu --num_fewshot -1", "--num_fewshot: must be at least 0"),
        ("--tasks mmlu --limit 0", "--limit: must be at least 1"),
        ("--seed -1", "--seed: must be at least 0"),
        ("--batch_size 0", "--batch_size: must be at least 1"),
        ("--haystack {folder}/absent.txt", "--haystack: no file"),
        ("--haystack {folder}/empty.txt", "--haystack: the files hold no text"),
        ("--haystack {folder}/binary.txt", "is not UTF-8"),
        ("--include_path {folder}/empty.txt --tasks mmlu", "--include_path: no folder"),
        ("--output_file {folder}/empty.txt/x.json", "--output_file: "),
        ("--plot x.png --tasks mmlu", "--plot draws RULER's scores"),
        ("--limit 2", "--limit is for lm-eval's tasks, and --tasks names none"),
        ("--tasks vt --num_fewshot 0", "--num_fewshot is for lm-eval's tasks"),
        ("--tasks mmlu --lengths 512", "--lengths is for RULER's tasks"),
    ],
    "longtask": [
        ("--data_path nowhere.jsonl", "--data_path: no file at 'nowhere.jsonl'"),
        ("--data_path {folder}", "--data_path: no file at "),
        ("--data_path {folder}/blank.jsonl", "holds no rows"),
        ("--data_path {folder}/qa.jsonl {folder}/binary.txt", "binary.txt line 1: not UTF-8"),
        ("--metric accuracy", "--metric accuracy: question 1 of qa has no options"),
        ("--max_rows 0", "--max_rows: must be at least 1"),
        ("--max_new_tokens 0", "--max_new_tokens: must be at least 1"),
        ("--max_new_tokens 64", "--max_new_tokens: 64 leave no room"),
        ("--max_new_tokens 56", "question 1 of qa: "),
        ("--num_shots -1", "--num_shots: must be at least 0"),
        ("--num_shots 1", "--num_shots and --shots_file go together"),
        ("--shots_file {folder}/qa.jsonl", "--num_shots and --shots_file go together"),
        ("--max_new_tokens 4 --num_shots 1 --shots_file {folder}/qa.jsonl", "--num_shots 1: --shots_file has 1 "),
        ("--max_new_tokens 4 --prompt_template chat_template", "no chat template"),
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "text.txt").write_text("A one.")
    (folder / "empty.txt").touch()
    (folder / "nul.txt").write_bytes(b"a\0b")
    (folder / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (folder / "blank.jsonl").write_text("\n")
    (folder / "qa.jsonl").write_text(json.dumps(ROW) + "\n")
    np.random.default_rng(0).integers(4, 320, 203).astype("<u2").tofile(folder / "ids.bin")
    np.array([1, 2, 3, 320] + [5] * 40, dtype="<u2").tofile(folder / "high.bin")
    (folder / "two.bin").write_bytes(bytes(402))
    (folder / "odd.bin").write_bytes(bytes(401))
    write_token_file(folder / "changed.bin", [range(4, 204)], tokenizer_name="tiny", vocab_size=320)
    (folder / "changed.bin").write_bytes((folder / "changed.bin").read_bytes()[::-1][::2] * 2)
    return folder


@pytest.mark.parametrize(
    ("script", "arguments", "message"), [(script, *case) for script, cases in BAD.items() for case in cases]
)
def test_bad_input_is_one_line(script, arguments, message, evaluate, tiny_model_dir, folder, tmp_path, monkeypatch):
    if arguments == "--flash_attn" and importlib.util.find_spec("flash_attn"):
        pytest.skip("flash_attn is installed")
    monkeypatch.setattr("longqlora.evaluation.frame.load_from_arguments", lambda args: pytest.fail("weights loaded"))
    # Nothing of a test may ask the hub, or set for good that it is not asked.
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.chdir(tmp_path)
    words = f"{DEFAULTS[script]} {arguments}".format(model=tiny_model_dir, folder=folder).split()
    code, _, stderr = evaluate(script, *words)
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(errors) == 1 and message in errors[0], stderr
    assert stderr.endswith(errors[0] + "\n") and "Traceback" not in stderr and list(tmp_path.iterdir()) == []


def test_bad_input_in_a_process_of_its_own(run_script, tmp_path):
    outcome = run_script("script/evaluate/evaluate.py", "--base_model", "m", "--data_path", "absent.bin", cwd=tmp_path)
    assert outcome.returncode == 2
    assert outcome.stderr.startswith("error: --data_path: no file at 'absent.bin'") and outcome.stderr.count("\n") == 1


@pytest.mark.parametrize("script", DEFAULTS)
def test_the_model_must_be_named(script, evaluate, folder):
    words = DEFAULTS[script].format(model="", folder=folder).split()[1:]
    assert "error: --model_name_or_path: give a model" in evaluate(script, *words)[2]
