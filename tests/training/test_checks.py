"""Checks before a run: the prompt template that is taken, said and recorded."""

from types import SimpleNamespace

import pytest
import yaml

from longqlora.settings.reader import resolve_settings
from longqlora.training.checks import check_data

TEMPLATES = {
    "none": ({}, "vicuna_v1.1", "the tokenizer has no chat template"),
    "its own": ({"has_template": True}, "chat_template", "the tokenizer's own"),
    "given": ({"prompt_template": "llama2", "has_template": True}, "llama2", None),
    "no sft": ({"sft": False, "has_template": True}, "vicuna_v1.1", None),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_prompt_template_of_a_run(name, tmp_path, tokenizer):
    changes, taken, reason = TEMPLATES[name]
    if changes.get("has_template"):
        tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    values = {"model_name_or_path": "m", "output_dir": str(tmp_path / "out"), "sft": True, **changes}
    values.pop("has_template", None)
    (tmp_path / "rows.jsonl").write_text('{"input": "a", "output": "b"}' if values["sft"] else '{"text": "a"}')
    values |= {"train_file": str(tmp_path / "rows.jsonl"), "data_cache_dir": str(tmp_path / "cache")}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    settings, _ = resolve_settings(str(tmp_path / "run.yaml"), [])
    settings, notices = check_data(settings, SimpleNamespace(vocab_size=320), tokenizer)
    assert settings.as_dict()["data"]["prompt_template"] == taken
    assert [notice.text for notice in notices] == [f"prompt_template: {taken} ({reason}; none was given)"] * bool(
        reason
    )
