"""A look at the data before training: what is learned is marked, and what a sample tells is near what there is."""

import json

import pytest
from conftest import sentences

from longqlora.data import preview
from longqlora.data.dataset import build_datasets
from longqlora.data.prompt import encode_for_training
from longqlora.settings.config import DataConfig

TURNS = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, "abcd", strict=True)]


def test_what_is_learned_is_marked(tokenizer):
    shown = preview.show_row(tokenizer, *encode_for_training(tokenizer, TURNS, template="llama2"))
    assert shown.endswith(" learned, between ⟦ ⟧: <s>[INST] a [/INST]⟦ b </s>⟧<s>[INST] c [/INST]⟦ d </s>⟧")
    ids, labels = encode_for_training(tokenizer, TURNS * 20)
    shown = preview.show_row(tokenizer, ids, labels)
    assert shown.count(" ... ") > 1 and shown.endswith("USER: c\\nASSISTANT: ⟦d</s>⟧") and len(shown) < 2000
    text = sentences(200)
    shown = preview.show_row(tokenizer, *[[1, *tokenizer(text, add_special_tokens=False).input_ids]] * 2)
    assert "<s>⟦" in shown and " ... " in shown and shown.endswith(f"{text[-20:]}⟧")


@pytest.mark.parametrize("settings", [{}, {"pack": True}, {"sft": True}, {"sft": True, "pack": True}])
@pytest.mark.parametrize("weights", [None, [2, 0.5]])
def test_measure(tokenizer, tmp_path, monkeypatch, settings, weights):
    """Exact where all rows are read or in the cache, else about right."""
    paths = [str(tmp_path / name) for name in ("a.jsonl", "b.json")]
    texts = [sentences(5 + index % 20, seed=index) for index in range(60)]
    rows = [{"input": text, "output": text} if settings.get("sft") else {"text": text} for text in texts]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "b.json").write_text(json.dumps(rows[:10]))
    config = DataConfig(
        paths, train_file_weights=weights, max_seq_length=250, data_cache_dir=str(tmp_path / "cache"), **settings
    )
    exact = preview.measure(tokenizer, config)
    monkeypatch.setattr(preview, "NUM_SAMPLED", 30)
    sampled = preview.measure(tokenizer, config)
    dataset, _ = build_datasets(tokenizer, config, log=lambda line: None)
    cached = preview.measure(tokenizer, config)
    assert exact == cached and exact.is_exact and not sampled.is_exact
    assert abs(exact.num_rows - len(dataset)) <= bool(weights)
    assert abs(sampled.num_rows / exact.num_rows - 1) < 0.2 and abs(sampled.num_tokens / exact.num_tokens - 1) < 0.2
    assert len(exact.shown) == 2 and texts[0].split()[0] in exact.shown[0]
    assert weights or exact.num_tokens == sum(map(len, dataset["input_ids"]))
    assert exact.describe() == f"train_file: {exact.num_rows:,} rows, {exact.num_tokens:,} tokens"
    assert sampled.describe().startswith("train_file: about ")
