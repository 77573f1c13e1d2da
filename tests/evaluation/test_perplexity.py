"""Perplexity and accuracy of a model on a token file, against float64 by hand, and the windows of each protocol."""

import copy
import json
import math
from itertools import pairwise, product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import tiny_config
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from longqlora.data.token_file import open_token_file
from longqlora.evaluation.frame import json_safe
from longqlora.evaluation.perplexity import PROTOCOLS, perplexity, plan_windows, spread, summarize
from longqlora.evaluation.perplexity_task import Perplexity, TokenScorer, Windows, find_split
from longqlora.inference.load import load_for_inference

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
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()


def token_scores(model, ids):
    """[2, len(ids) - 1]: -log p of each token after the first, and whether it is the likeliest, from float64 logits."""
    with torch.no_grad():
        logits = copy.deepcopy(model).double()(input_ids=torch.tensor([ids.tolist()])).logits[0, :-1]
    targets = torch.tensor(ids[1:].tolist())
    losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    return np.stack([losses.numpy(), (logits.argmax(-1) == targets).numpy()])


def scores_by_hand(model, tokens, protocol, seq_len, stride):
    """(loss, accuracy): the mean of window means, or the mean over the tokens that are new in a window."""
    if protocol == "longlora":
        starts = list(range(0, len(tokens) - seq_len, stride))[:-1]
        return np.mean([token_scores(model, tokens[start : start + seq_len]) for start in starts], axis=(0, 2))
    new, known = [], 1
    for start in range(0, len(tokens), stride):
        window = tokens[start : start + seq_len]
        new.append(token_scores(model, window)[:, known - start - 1 :])
        known = start + len(window)
        if known == len(tokens):
            return np.concatenate(new, axis=1).mean(axis=1)


@pytest.fixture
def loss_of(model, tmp_path):
    """The summary of `model` on tokens, by its windows and trials."""

    def measure(tokens, seq_len, stride, *, model=model, block=None, **options):
        tokens.tofile(tmp_path / "tokens.bin")
        windows = Windows(open_token_file(tmp_path / "tokens.bin"), stride, **options)
        scorer = TokenScorer(model, prefill_chunk_size=block)
        return windows.summarize([windows.ask(scorer, trial) for trial in windows.trials(seq_len)])

    return measure


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("block", [None, 5])
@pytest.mark.parametrize("protocol, num_windows, num_tokens", [("longlora", 5, 75), ("stride", 7, 69)])
def test_loss_and_accuracy_against_float64(
    model, loss_of, protocol, num_windows, num_tokens, block, batch_size, monkeypatch
):
    # The logits of a batch are made in several chunks.
    monkeypatch.setattr("longqlora.evaluation.perplexity_task.CHUNK_FLOATS", 320 * 7)
    tokens = make_tokens(70)
    # Half of the tokens follow the model, so that there is something to hit.
    for position in range(1, 70, 2):
        with torch.no_grad():
            ids = torch.tensor([tokens[max(0, position - 9) : position].tolist()])
            tokens[position] = int(model(input_ids=ids).logits[0, -1].argmax())
    found = loss_of(tokens, 16, 9, protocol=protocol, batch_size=batch_size, block=block)
    loss, accuracy = scores_by_hand(model, tokens, protocol, 16, 9)
    assert (found["num_windows"], found["num_tokens"]) == (num_windows, num_tokens)
    assert found["loss"] == pytest.approx(loss, abs=1e-6) and found["perplexity"] == math.exp(found["loss"])
    assert found["accuracy"] == pytest.approx(accuracy, abs=1e-12) and 0.05 < accuracy < 0.95


def test_loss_by_position(model, loss_of):
    tokens = make_tokens(150)
    rows = np.array([token_scores(model, tokens[start : start + 100])[0] for start in (0, 20)])
    blocks = loss_of(tokens, 100, 20)["loss_by_position"]
    assert len(blocks) == 64 and blocks[0]["start"] == 1 and blocks[-1]["end"] == 100
    assert all(a["end"] == b["start"] for a, b in pairwise(blocks))
    for block in blocks:
        assert block["loss"] == pytest.approx(rows[:, block["start"] - 1 : block["end"] - 1].mean(), abs=1e-5)


@pytest.mark.parametrize("model_type, overrides, splits", [
    ("qwen3", {}, True),
    ("gpt_neox", {}, True),
    ("gemma2", {"head_dim": 16, "final_logit_softcapping": 1.0, "initializer_range": 1.0}, False),
    ("cohere", {"logit_scale": 0.25, "initializer_range": 1.0}, False),
])  # fmt: skip
def test_heads_that_do_more_than_a_product_are_recognised(loss_of, model_type, overrides, splits):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type, **overrides)).eval()
    tokens = make_tokens(60)
    assert (find_split(model, torch.from_numpy(tokens[None, :16].astype(np.int64))) is not None) == splits
    found = loss_of(tokens, 64, 8, model=model, protocol="stride")
    assert found["num_windows"] == 1, "the file fits in a window"
    assert found["loss"] == pytest.approx(token_scores(model, tokens)[0].mean(), abs=1e-5)


def test_adapter_is_measured_with_all_it_trained(tiny_model_dir, model, tmp_path, data, evaluate, loss_of):
    torch.manual_seed(1)
    options = {"init_lora_weights": False, "modules_to_save": ["embed_tokens", "norm", "lm_head"]}
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], **options)
    peft_model = get_peft_model(copy.deepcopy(model), lora)
    for name, parameter in peft_model.named_parameters():
        if "modules_to_save" in name:
            parameter.data *= 1.5
    peft_model.save_pretrained(tmp_path / "adapter")
    code, _, err = evaluate("evaluate", "--peft_model", tmp_path / "adapter", "--seq_len", 32, "--sliding_window", 50,
                            "--data_path", data, "--output_file", tmp_path / "r.json")  # fmt: skip
    assert code == 0, err
    result = json.loads((tmp_path / "r.json").read_text())
    expected, _ = scores_by_hand(peft_model.eval(), make_tokens(), "longlora", 32, 50)
    assert result["loss"] == pytest.approx(expected, abs=1e-5) and result["base_model"] == str(tiny_model_dir)
    assert abs(result["loss"] - loss_of(make_tokens(), 32, 50)["loss"]) > 0.01


def test_reading_in_blocks_binds_attention_without_a_mask(tiny_model_dir, data, loss_of):
    task = Perplexity(Windows(open_token_file(data), 50, prefill_chunk_size=8))
    (trials,) = task.make_trials(SimpleNamespace(config=tiny_config(), context_size=32, warn_beyond_context=print))
    task.use(load_for_inference(str(tiny_model_dir)))
    assert task.scorer.model.config._attn_implementation == "sdpa_no_mask"
    found = task.score([task.ask(trial) for trial in trials])
    assert found["loss"] == pytest.approx(loss_of(make_tokens(), 32, 50)["loss"], abs=1e-6) and found["seq_len"] == 32


def test_overflowing_model_reports_null_and_keeps_the_loss(tmp_path, tiny_tokenizer, model, data, evaluate):
    loud = copy.deepcopy(model)
    loud.lm_head.weight.data *= 1e5
    loud.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    code, out, err = evaluate("evaluate", "--base_model", tmp_path / "model", "--seq_len", 16,
                              "--sliding_window", 40, "--data_path", data, "--output_file", tmp_path / "r.json",
                              "--plot", tmp_path / "r.png")  # fmt: skip
    assert code == 0, err
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["perplexity"] is None and result["loss"] > 709 and "perplexity inf" in out


@pytest.mark.realdata
@pytest.mark.parametrize("num_tokens, loss", [(512, 3.668480), (2048, 3.860651)])
def test_stories260k_loss(shared_data, loss_of, num_tokens, loss):
    model = AutoModelForCausalLM.from_pretrained(shared_data / "stories260k" / "hf").eval()
    ids = json.loads((shared_data / "reference_vectors" / "alice_ids.json").read_text())
    tokens = np.array(ids["ids"] if isinstance(ids, dict) else ids, dtype="<u2")[:num_tokens]
    summary = loss_of(tokens, num_tokens, 1, model=model, protocol="stride")
    assert summary["num_windows"] == 1 and summary["loss"] == pytest.approx(loss, abs=1e-4)


def window_loss(*block_totals):
    return {"total": sum(block_totals), "block_totals": block_totals, "num_correct": 0}


def longlora_starts(num_tokens, seq_len, stride):
    """The loop of LongLoRA's eval.py; empty where it raises."""
    starts, start = [], 0
    while start < num_tokens - seq_len:
        starts.append(start)
        start += stride
    return starts[:-1]


def test_longlora_windows_are_those_of_the_original_loop():
    for num_tokens, seq_len, stride in product(range(1, 40), range(2, 14), range(1, 16)):
        expected = longlora_starts(num_tokens, seq_len, stride)
        if not expected:
            assert num_tokens < seq_len + stride + 1
            with pytest.raises(ValueError, match=f"needs at least {seq_len + stride + 1} "):
                plan_windows(num_tokens, seq_len=seq_len, stride=stride)
            continue
        plan = plan_windows(num_tokens, seq_len=seq_len, stride=stride)
        assert [window.start for window in plan.windows] == expected
        assert {(window.length, window.score_from) for window in plan.windows} == {(seq_len, 1)}
        covered = {t for start in expected for t in range(start, start + seq_len)}
        assert plan.num_uncovered_tokens == num_tokens - len(covered)


def test_stride_protocol_scores_every_token_but_the_first_once():
    for num_tokens, seq_len, overlap in product(range(2, 40), range(2, 14), range(1, 13)):
        if overlap < seq_len:
            plan = plan_windows(num_tokens, seq_len=seq_len, stride=seq_len - overlap, protocol="stride")
            scored = [w.start + offset for w in plan.windows for offset in range(w.score_from, w.length)]
            assert scored == list(range(1, num_tokens))
            assert all(2 <= w.length <= seq_len and w.score_from >= 1 for w in plan.windows)
            assert plan.num_uncovered_tokens == 0 and plan.num_scored_tokens == num_tokens - 1


def test_max_windows_is_an_evenly_spread_subset_and_says_so():
    plan = plan_windows(1000, seq_len=10, stride=10, max_windows=4)
    assert [window.start for window in plan.windows] == [0, 320, 650, 970]
    assert plan.num_windows_skipped == 94 and "evenly spread subset, 94 windows skipped" in plan.describe()
    assert spread([1, 2, 3], 1) == [1] and spread([1, 2, 3], 9) == [1, 2, 3]
    assert all(len(set(spread(range(n), k))) == k for n in range(1, 30) for k in range(1, n + 1))


def test_overflow_and_nan_are_json_safe_and_the_loss_is_kept():
    assert perplexity(1000.0) == math.inf and perplexity(1.0) == math.e
    plan = plan_windows(10, seq_len=3, stride=4)
    summary = json_safe(summarize(plan, [window_loss(1000.0, 1000.0)]))
    assert summary["perplexity"] is None and summary["loss"] == 1000.0 and summary["num_windows_nonfinite"] == 0
    summary = json_safe(summarize(plan, [window_loss(math.nan, math.inf)]))
    assert summary["loss"] is None and summary["num_windows_nonfinite"] == 1


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_sums_do_not_depend_on_order(protocol):
    plan = plan_windows(36, seq_len=8, stride=7, protocol=protocol)
    losses = [window_loss(*[total] * 7) for total in [1e16, 1.0, 1.0, 1.0, 1.0][: len(plan.windows)]]
    assert summarize(plan, losses) == summarize(plan, losses[::-1])
