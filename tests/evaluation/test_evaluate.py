"""script/evaluate/evaluate.py and evaluation/scoring.py: the numbers, resuming, several processes, bad input."""

import copy
import hashlib
import importlib.util
import json
import socket
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import REPO, tiny_config

from longqlora.cli import run_main
from longqlora.data.token_file import write_token_file
from longqlora.evaluation.perplexity import WindowLoss, plan_windows, summarize
from longqlora.evaluation.scoring import TokenScorer, WindowLedger, find_split, measure

EVALUATE = "script/evaluate/evaluate.py"
CPU = torch.device("cpu")
NUM_TOKENS = 203


def make_tokens(num_tokens=NUM_TOKENS, vocab_size=320):
    return np.random.default_rng(0).integers(4, vocab_size, num_tokens).astype("<u2")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "x.bin"
    make_tokens().tofile(path)
    return path


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()


@pytest.fixture
def evaluate(monkeypatch, capsys):
    """Run the script's main in this process: (exit code, stdout, stderr)."""
    spec = importlib.util.spec_from_file_location("evaluate_under_test", REPO / EVALUATE)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def run(*args):
        monkeypatch.setattr("sys.argv", ["evaluate.py", *map(str, args)])
        try:
            run_main(script.main)
            code = 0
        except SystemExit as exit_info:
            code = exit_info.code
        return (code, *capsys.readouterr())

    return run


def logits_in_float64(model, ids):
    double = copy.deepcopy(model).double()
    with torch.no_grad():
        return double(input_ids=torch.tensor([ids.tolist()])).logits[0]


def hits_in_float64(model, ids):
    """Whether each token after the first is the likeliest."""
    return [int(logits_in_float64(model, ids)[p].argmax()) == ids[p + 1] for p in range(len(ids) - 1)]


def nll_in_float64(model, ids):
    """-log p of every token after the first, one token at a time from full float64 logits."""
    logits = logits_in_float64(model, ids)
    return [-float(torch.log_softmax(logits[p], -1)[int(ids[p + 1])]) for p in range(len(ids) - 1)]


def loss_of(model, tokens, *, batch_size=1, **plan):
    plan = plan_windows(len(tokens), **plan)
    losses = measure(TokenScorer(model), tokens, plan, batch_size=batch_size, device=CPU, ledger=WindowLedger(None, {}))
    return summarize(plan, losses)


def test_longlora_loss_against_float64(model):
    tokens = make_tokens(70)
    means = [np.mean(nll_in_float64(model, tokens[start : start + 16])) for start in list(range(0, 70 - 16, 9))[:-1]]
    summary = loss_of(model, tokens, seq_len=16, stride=9)
    assert summary["num_windows"] == len(means) == 5
    assert summary["loss"] == pytest.approx(np.mean(means), abs=1e-6)
    assert summary["perplexity"] == pytest.approx(np.exp(np.mean(means)), rel=1e-6)


def test_stride_loss_against_float64(model):
    tokens = make_tokens(53)
    expected, scored = 0.0, 0
    for position in range(1, 53):
        # The window in which a token is new: the first whose end lies behind it.
        start = next(start for start in range(0, 53, 7) if position < start + 16)
        nll = nll_in_float64(model, tokens[start : min(start + 16, 53)])
        expected, scored = expected + nll[position - start - 1], scored + 1
    summary = loss_of(model, tokens, seq_len=16, stride=7, protocol="stride", batch_size=4)
    assert summary["num_tokens"] == scored == 52
    assert summary["loss"] == pytest.approx(expected / 52, abs=1e-6)


def accuracy_by_hand(model, tokens, protocol, seq_len, stride):
    """The same tokens as the losses: the mean of window means, or the mean over tokens that are new in a window."""
    if protocol == "longlora":
        starts = list(range(0, len(tokens) - seq_len, stride))[:-1]
        return np.mean([np.mean(hits_in_float64(model, tokens[start : start + seq_len])) for start in starts])
    hits, known = [], 1
    for start in range(0, len(tokens), stride):
        window = tokens[start : start + seq_len]
        hits += hits_in_float64(model, window)[known - start - 1 :]
        known = start + len(window)
        if known == len(tokens):
            return np.mean(hits)


@pytest.mark.parametrize("protocol", ["longlora", "stride"])
@pytest.mark.parametrize("block", [None, 5])
def test_accuracy_against_float64(model, protocol, block, monkeypatch):
    monkeypatch.setattr("longqlora.evaluation.scoring.CHUNK_FLOATS", 320 * 7)
    tokens = make_tokens(70)
    # Half of the tokens follow the model, so that there is something to hit.
    for position in range(1, 70, 2):
        tokens[position] = int(logits_in_float64(model, tokens[max(0, position - 9) : position])[-1].argmax())
    plan = plan_windows(70, seq_len=16, stride=9, protocol=protocol)
    scorer = TokenScorer(model, prefill_chunk_size=block)
    losses = measure(scorer, tokens, plan, batch_size=2, device=CPU, ledger=WindowLedger(None, {}))
    expected = accuracy_by_hand(model, tokens, protocol, 16, 9)
    assert summarize(plan, losses)["accuracy"] == pytest.approx(expected, abs=1e-12) and 0.05 < expected < 0.95


def test_stored_windows_without_hits_are_measured_again(tmp_path):
    """What evaluate.py kept before it counted hits: a loss and its blocks for each window."""
    fingerprint = hashlib.sha256(json.dumps({"a": 1}, sort_keys=True).encode()).hexdigest()
    (tmp_path / ".r.json.windows-0.jsonl").write_text(
        json.dumps({"fingerprint": fingerprint}) + "\n" + '{"seq_len": 8, "windows": [[0, 1.5, [1.0, 0.5]]]}\n'
    )
    ledger = WindowLedger(tmp_path / "r.json", {"a": 1})
    ledger.start()
    assert not ledger.done and ledger.num_foreign == 1
    ledger.remove()


def test_stride_protocol_is_one_full_pass_when_the_file_fits(model):
    tokens = make_tokens(40)
    summary = loss_of(model, tokens, seq_len=64, stride=8, protocol="stride")
    assert summary["num_windows"] == 1
    assert summary["loss"] == pytest.approx(np.mean(nll_in_float64(model, tokens)), abs=1e-6)


@pytest.mark.parametrize("protocol", ["longlora", "stride"])
def test_batching_does_not_change_the_number(model, protocol):
    one, three = (
        loss_of(model, make_tokens(), seq_len=32, stride=10, protocol=protocol, batch_size=size) for size in (1, 3)
    )
    assert one["loss"] == pytest.approx(three["loss"], abs=1e-6)
    assert one["num_tokens"] == three["num_tokens"]


def test_loss_by_position(model):
    tokens = make_tokens(150)
    summary = loss_of(model, tokens, seq_len=100, stride=20)
    rows = np.array([nll_in_float64(model, tokens[start : start + 100]) for start in (0, 20)])
    blocks = summary["loss_by_position"]
    assert len(blocks) == 64 and blocks[0]["start"] == 1 and blocks[-1]["end"] == 100
    assert all(a["end"] == b["start"] for a, b in pairwise(blocks))
    for block in blocks:
        assert block["loss"] == pytest.approx(rows[:, block["start"] - 1 : block["end"] - 1].mean(), abs=1e-5)


def test_chunks_of_logits_give_the_same_loss(model, monkeypatch):
    whole = loss_of(model, make_tokens(), seq_len=32, stride=40)["loss"]
    monkeypatch.setattr("longqlora.evaluation.scoring.CHUNK_FLOATS", 320 * 5)
    assert loss_of(model, make_tokens(), seq_len=32, stride=40, batch_size=3)["loss"] == pytest.approx(whole, abs=1e-6)


@pytest.mark.parametrize("model_type, overrides, splits", [
    ("qwen3", {}, True),
    ("gpt_neox", {"num_key_value_heads": None}, True),
    ("gemma2", {"head_dim": 16, "final_logit_softcapping": 1.0, "initializer_range": 1.0}, False),
    ("cohere", {"logit_scale": 0.25, "initializer_range": 1.0}, False),
])  # fmt: skip
def test_heads_that_do_more_than_a_product_are_recognised(model_type, overrides, splits):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    overrides = {name: value for name, value in overrides.items() if value is not None}
    model = AutoModelForCausalLM.from_config(tiny_config(model_type, **overrides)).eval()
    tokens = make_tokens(60)
    assert (find_split(model, torch.from_numpy(tokens[None, :16].astype(np.int64))) is not None) == splits
    expected = np.mean(nll_in_float64(model, tokens))
    assert loss_of(model, tokens, seq_len=60, stride=8, protocol="stride")["loss"] == pytest.approx(expected, abs=1e-5)


def make_adapter(tiny_model_dir, folder):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    lora = LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], init_lora_weights=False,
        modules_to_save=["embed_tokens", "norm", "lm_head"],
    )  # fmt: skip
    peft_model = get_peft_model(base, lora)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "modules_to_save" in name:
                parameter.mul_(1.5)
    peft_model.save_pretrained(folder)
    return peft_model.eval()


def test_adapter_is_measured_with_all_it_trained(tiny_model_dir, tmp_path, data, evaluate, model):
    peft_model = make_adapter(tiny_model_dir, tmp_path / "adapter")
    code, out, err = evaluate(
        "--peft_model", tmp_path / "adapter", "--seq_len", 32, "--sliding_window", 50, "--data_path", data,
        "--output_file", tmp_path / "r.json",
    )  # fmt: skip
    assert code == 0, err
    result = json.loads((tmp_path / "r.json").read_text())
    tokens = make_tokens()
    with torch.no_grad():
        means = [
            float(peft_model(input_ids=(ids := torch.tensor([tokens[s : s + 32].tolist()])), labels=ids).loss)
            for s in list(range(0, NUM_TOKENS - 32, 50))[:-1]
        ]
    assert result["loss"] == pytest.approx(np.mean(means), abs=1e-5)
    assert result["base_model"] == str(tiny_model_dir)
    assert abs(result["loss"] - loss_of(model, tokens, seq_len=32, stride=50)["loss"]) > 0.01


def test_report_of_several_lengths(tiny_model_dir, tmp_path, data, evaluate, model):
    out_file, plot = tmp_path / "deep" / "r.json", tmp_path / "r.png"
    code, out, err = evaluate(
        "--base_model", tiny_model_dir, "--seq_len", 32, 128, 32, "--sliding_window", 16, "--batch_size", 2,
        "--max_windows", 3, "--data_path", data, "--output_file", out_file, "--plot", plot, "--context_size", "-1",
    )  # fmt: skip
    assert code == 0, err
    results = json.loads(out_file.read_text())["results"]
    assert [result["seq_len"] for result in results] == [32, 128]
    expected = loss_of(model, make_tokens(), seq_len=128, stride=16, max_windows=3)
    assert results[1]["loss"] == pytest.approx(expected["loss"], abs=1e-6) and results[1]["num_windows"] == 3
    assert {"perplexity", "loss", "accuracy", "num_windows", "num_tokens", "seq_len", "sliding_window", "context_size",
            "protocol", "dtype", "attention", "versions", "loss_by_position", "data_file", "data_sha256", "base_model",
            "peft_model", "rope_parameters"} <= results[0].keys()  # fmt: skip
    assert f", accuracy {results[0]['accuracy']:.6f} (" in out
    assert "evenly spread subset, 7 windows skipped" in results[0]["protocol"]
    assert "seq_len 128 is beyond the model's context of 64" in out and out.count("protocol: longlora: ") == 2
    assert "left out: 8 windows; " in out and results[0]["attention"] == "dense causal (sdpa)"
    assert plot.read_bytes().startswith(b"\x89PNG") and [p.name for p in out_file.parent.iterdir()] == ["r.json"]


def test_context_size_sets_rope(tiny_model_dir, tmp_path, data, evaluate):
    code, _, err = evaluate(
        "--base_model", tiny_model_dir, "--context_size", 128, "--seq_len", 100, "--sliding_window", 60,
        "--data_path", data, "--output_file", tmp_path / "r.json", "--dtype", "bf16",
    )  # fmt: skip
    assert code == 0, err
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["rope_parameters"]["factor"] == 2.0 and result["context_size"] == 128
    assert result["dtype"] == "bfloat16" and result["results"][0]["loss"] == result["loss"]


def arguments(model_dir, data, out_file):
    return ["--base_model", model_dir, "--seq_len", 16, 24, "--sliding_window", 8, "--batch_size", 2, "--data_path",
            data, "--output_file", out_file]  # fmt: skip


def numbers(path):
    """Results without what names the moment of the run."""
    return [{k: v for k, v in result.items() if k != "versions"} for result in json.loads(path.read_text())["results"]]


class Killed(BaseException):
    pass


def kill_after(monkeypatch, num_batches):
    """Let the scorer die like a killed process after some batches; returns the list of its calls."""
    calls, score = [], TokenScorer.__call__

    def dying(self, input_ids):
        if len(calls) == num_batches:
            raise Killed
        calls.append(input_ids.shape)
        return score(self, input_ids)

    monkeypatch.setattr(TokenScorer, "__call__", dying)
    return calls


def test_killed_run_goes_on_and_gives_the_identical_result(tiny_model_dir, tmp_path, data, evaluate, monkeypatch):
    whole, resumed = tmp_path / "whole.json", tmp_path / "resumed.json"
    with monkeypatch.context() as patch:
        total = kill_after(patch, -1)
        assert evaluate(*arguments(tiny_model_dir, data, whole))[0] == 0
    with monkeypatch.context() as patch:
        kill_after(patch, len(total) - 4)
        with pytest.raises(Killed):
            evaluate(*arguments(tiny_model_dir, data, resumed))
    assert not resumed.exists()
    [partial] = tmp_path.glob(".resumed.json.windows-*.jsonl")
    partial.write_bytes(partial.read_bytes()[:-20])
    (tmp_path / ".resumed.json.windows-7.jsonl").write_bytes(partial.read_bytes()[:300])
    with monkeypatch.context() as patch:
        calls = kill_after(patch, -1)
        code, out, err = evaluate(*arguments(tiny_model_dir, data, resumed))
    assert code == 0 and "resuming: " in out, err
    assert len(calls) == 5, "the four batches left and the one whose line was cut short"
    assert numbers(resumed) == numbers(whole)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["resumed.json", "whole.json"]


def test_other_arguments_start_anew(tiny_model_dir, tmp_path, data, evaluate, monkeypatch):
    out_file = tmp_path / "r.json"
    for change in (["--sliding_window", 9], ["--protocol", "stride"], ["--max_windows", 3], ["--dtype", "bf16"]):
        with monkeypatch.context() as patch:
            kill_after(patch, 3)
            with pytest.raises(Killed):
                evaluate(*arguments(tiny_model_dir, data, out_file))
        with monkeypatch.context() as patch:
            kill_after(patch, 0)
            with pytest.raises(Killed):
                evaluate(*arguments(tiny_model_dir, data, out_file), *change)
        header, *rows = (tmp_path / ".r.json.windows-0.jsonl").read_text().splitlines()
        assert "fingerprint" in header and not rows, change


def test_ledger_keeps_every_float(tmp_path):
    ledger = WindowLedger(tmp_path / "[a]*.json", {"a": 1})
    ledger.start()
    losses = [WindowLoss(0.1 + 0.2, (1e-300, float("inf")), 3), WindowLoss(3.0, (1 / 3, 2.0), 0)]
    ledger.add(8, [0, 5], losses)
    again = WindowLedger(tmp_path / "[a]*.json", {"a": 1})
    again.start()
    assert again.done == {(8, 0): losses[0], (8, 5): losses[1]}
    other = WindowLedger(tmp_path / "[a]*.json", {"a": 2})
    other.start()
    assert not other.done and other.num_foreign == 1
    other.remove()
    assert not list(tmp_path.iterdir())


def test_two_processes_give_the_bits_of_one(tiny_model_dir, tmp_path, data, evaluate, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", 2, "--master_port", port,
               REPO / EVALUATE, *arguments(tiny_model_dir, data, tmp_path / "two.json")]  # fmt: skip
    outcome = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=120)
    assert outcome.returncode == 0, outcome.stderr[-2000:]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert evaluate(*arguments(tiny_model_dir, data, tmp_path / "one.json"))[0] == 0
    finally:
        torch.set_num_threads(threads)
    assert numbers(tmp_path / "two.json") == numbers(tmp_path / "one.json")
    assert outcome.stdout.count("perplexity") == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one.json", "two.json"]


BAD_INPUT = {
    "too short": (["--seq_len", 200], "needs at least 209 "),
    "one of two too short": (["--seq_len", 16, 500], "needs at least 509 "),
    "seq_len": (["--seq_len", 1], "seq_len must be at least 2"),
    "stride": (["--sliding_window", 0], "must be at least 1, not 0"),
    "stride of protocol": (["--protocol", "stride", "--sliding_window", 16], "at most 15"),
    "batch": (["--batch_size", 0], "batch_size must be at least 1"),
    "windows": (["--max_windows", 0], "max_windows must be at least 1"),
    "context": (["--context_size", 0], "--context_size: must be at least 1"),
    "no data": (["--data_path", "absent.bin"], "no file at 'absent.bin'"),
    "dtype": (["--data_dtype", "uint32", "--data_path", "{data}.two"], "no multiple of 4"),
    "odd": (["--data_path", "{data}.odd"], "no multiple of 2"),
    "empty": (["--data_path", "{data}.empty"], "is empty"),
    "ids": (["--data_path", "{data}.high"], "id 320 at position 3 is outside the vocabulary of 320"),
    "no model": (["--base_model", "/absent/model"], "no model folder at '/absent/model'"),
    "no adapter": (["--peft_model", "/absent/adapter"], "no folder at '/absent/adapter'"),
    "hub name": (["--base_model", "nobody/nothing"], "nobody/nothing"),
    "flash": (["--flash_attn"], "--flash_attn: the flash_attn package is not installed"),
    "plot": (["--plot", "x.doc"], "must end in one of .png"),
    "folder": (["--output_file", "."], "is a folder"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_one_line(tiny_model_dir, data, evaluate, name):
    change, message = BAD_INPUT[name]
    if name == "flash" and importlib.util.find_spec("flash_attn"):
        pytest.skip("flash_attn is installed")
    data.with_name("x.bin.two").write_bytes(bytes(402))
    data.with_name("x.bin.odd").write_bytes(bytes(401))
    data.with_name("x.bin.empty").write_bytes(b"")
    np.array([1, 2, 3, 320] + [5] * 40, dtype="<u2").tofile(data.with_name("x.bin.high"))
    defaults = ["--base_model", tiny_model_dir, "--seq_len", 16, "--sliding_window", 8, "--data_path", data]
    code, out, err = evaluate(*defaults, *(str(part).format(data=data) for part in change))
    errors = [line for line in err.splitlines() if line.startswith("error:")]
    assert code == 2 and len(errors) == 1 and message in errors[0], err
    assert err.endswith(errors[0] + "\n") and "Traceback" not in err


def test_model_must_be_named(data, evaluate):
    assert "error: --base_model: give a model" in evaluate("--data_path", data)[2]


def test_changed_data_under_a_sidecar_is_refused(tiny_model_dir, tmp_path, evaluate):
    path = tmp_path / "x.bin"
    write_token_file(path, [make_tokens().tolist()], tokenizer_name="tiny", vocab_size=320)
    path.write_bytes(path.read_bytes()[::-1][::2] * 2)
    code, _, err = evaluate("--base_model", tiny_model_dir, "--seq_len", 16, "--data_path", path, "--sliding_window", 8)
    assert code == 2 and err.count("error:") == 1


def test_bad_input_in_a_process_of_its_own(run_script, tmp_path):
    outcome = run_script(EVALUATE, "--base_model", "m", "--data_path", "absent.bin", cwd=tmp_path)
    assert outcome.returncode == 2
    assert outcome.stderr.startswith("error: --data_path: no file at 'absent.bin'") and outcome.stderr.count("\n") == 1


def test_overflowing_model_reports_null_and_keeps_the_loss(tmp_path, tiny_tokenizer, model, data, evaluate):
    folder = tmp_path / "model"
    loud = copy.deepcopy(model)
    with torch.no_grad():
        loud.lm_head.weight.mul_(1e5)
    loud.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    code, out, err = evaluate(
        "--base_model", folder, "--seq_len", 16, "--sliding_window", 40, "--data_path", data,
        "--output_file", tmp_path / "r.json", "--plot", tmp_path / "r.png",
    )  # fmt: skip
    assert code == 0, err
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["perplexity"] is None and result["loss"] > 709 and "perplexity inf" in out


@pytest.mark.realdata
@pytest.mark.parametrize("num_tokens, loss", [(512, 3.668480), (2048, 3.860651)])
def test_stories260k_loss(shared_data, num_tokens, loss):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(shared_data / "stories260k" / "hf").eval()
    ids = json.loads((shared_data / "reference_vectors" / "alice_ids.json").read_text())
    tokens = np.array(ids["ids"] if isinstance(ids, dict) else ids, dtype="<u2")[:num_tokens]
    summary = loss_of(model, tokens, seq_len=num_tokens, stride=1, protocol="stride")
    assert summary["num_windows"] == 1 and summary["loss"] == pytest.approx(loss, abs=1e-4)
