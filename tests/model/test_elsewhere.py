"""An adapter folder in other software: the lines of docs/serving.md give the logits that our own loader gives."""

import re

import pytest
import torch
from model_folders import extended, make_adapter
from peft import AutoPeftModelForCausalLM
from transformers import AutoConfig, AutoModelForCausalLM

from longqlora.inference.load import load_for_inference
from longqlora.model.base import load_tokenizer
from longqlora.model.saved_folder import save_config, save_tokenizer

LENGTH = 1024  # of a base with 256
IDS = torch.arange(4, 504)[None]


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        return model.float().eval()(IDS).logits


@pytest.fixture(scope="module", params=["linear", "yarn", "dynamic", "ntk"])
def final(request, tmp_path_factory, repo):
    """Adapter of the repository's small model, with embedding and norm trained, as training saves it."""
    base, rope_type = repo / "data" / "tiny-llama", request.param
    folder = make_adapter(base, tmp_path_factory.mktemp(rope_type) / "final", context=None,
                          modules_to_save=["embed_tokens", "norm"])  # fmt: skip
    save_config(extended(AutoConfig.from_pretrained(base), LENGTH, rope_type), folder)
    save_tokenizer(load_tokenizer(str(base)), folder)
    return str(folder)


def documented_lines(repo, first: str) -> str:
    """The indented block of docs/serving.md that begins with `first`."""
    text = (repo / "docs" / "serving.md").read_text()
    (block,) = re.findall(rf"(?m)^    {re.escape(first)}.*\n(?:    .*\n)*", text)
    return "\n".join(line[4:] for line in block.splitlines())


@pytest.mark.parametrize("first", ["from peft import AutoPeftModelForCausalLM", "from peft import PeftConfig"])
def test_documented_lines_load_the_adapter_with_its_rope(final, repo, first):
    names = {"final": final}
    exec(documented_lines(repo, first), names)
    expected = logits(load_for_inference(None, adapter_name_or_path=final).model)
    torch.testing.assert_close(logits(names["model"]), expected, atol=2e-4, rtol=0)


def test_why_the_lines_are_needed(final):
    """A release that fails here does it right by itself: shorten docs/serving.md."""
    expected = logits(load_for_inference(None, adapter_name_or_path=final).model)
    assert (logits(AutoPeftModelForCausalLM.from_pretrained(final)) - expected).abs().max() > 1
    with pytest.raises(OSError, match="no file named"):
        AutoModelForCausalLM.from_pretrained(final)
