"""transformers 4.57 itself reads what is saved here: the same tokens and logits as transformers 5.

It is installed beside the cache of pytest, with the two packages that it needs in older versions; all else is shared.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from model_folders import extended, make_adapter
from safetensors import safe_open
from transformers import AutoConfig

from longqlora.model.base import load_tokenizer
from longqlora.model.merge import merge
from longqlora.model.rope_scaling import ROPE_METHODS
from longqlora.model.saved_folder import save_config, save_tokenizer

PACKAGES = ["transformers==4.57.3", "tokenizers==0.22.2", "huggingface-hub==0.36.2"]
TARGET = 1024

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def transformers_4(request) -> Path:
    """Folder for PYTHONPATH."""
    folder = Path(request.config.cache.mkdir("transformers-4.57.3"))
    if not (folder / "complete").is_file():
        words = ["-m", "pip", "install", "-q", "--no-deps", "--upgrade", "--target", str(folder), *PACKAGES]
        outcome = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=600)
        if outcome.returncode:
            pytest.skip(f"transformers 4.57.3 cannot be installed: {outcome.stderr.strip().splitlines()[-1]}")
        (folder / "complete").touch()
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory, repo) -> Path:
    """An adapter and its merged model for every way to scale RoPE."""
    root = tmp_path_factory.mktemp("folders")
    base = Path(shutil.copytree(repo / "data" / "tiny-llama", root / "base"))
    for rope_type in ROPE_METHODS:
        final = make_adapter(base, root / rope_type / "final", context=None, modules_to_save=["norm"])
        save_config(extended(AutoConfig.from_pretrained(base), TARGET, rope_type), final)
        save_tokenizer(load_tokenizer(str(base)), final)
        merge(str(base), str(final), root / rope_type / "merged", dtype=torch.float32)
    return root


def read(folders: Path, output: Path, path: Path | None = None) -> tuple[str, dict[str, torch.Tensor]]:
    """The version of transformers that read the folders, and what it answered."""
    words = [str(Path(__file__).with_name("model_folder_reader.py")), str(folders), str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} | ({"PYTHONPATH": str(path)} if path else {})
    outcome = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, timeout=600)
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    with safe_open(output, "pt") as file:
        return file.metadata()["version"], {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def test_the_same_tokens_and_logits(folders, transformers_4, tmp_path):
    new, expected = read(folders, tmp_path / "5.safetensors")
    old, found = read(folders, tmp_path / "4.safetensors", transformers_4)
    assert new.startswith("5.") and old == "4.57.3" and len(found) == 4 * len(ROPE_METHODS)
    num_tokens = len(expected["linear.merged.logits"])
    assert 256 < num_tokens < TARGET, "the text must reach past the base's context"
    for name, answer in found.items():
        torch.testing.assert_close(answer, expected[name], atol=0 if "tokens" in name else 1e-4, rtol=0, msg=name)
    for rope_type in ROPE_METHODS:
        merged, adapted = (expected[f"{rope_type}.{kind}.logits"] for kind in ("merged", "final"))
        torch.testing.assert_close(merged, adapted, atol=1e-4, rtol=0, msg=rope_type)
