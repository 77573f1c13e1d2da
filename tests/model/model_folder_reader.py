"""Read model folders with the transformers that this process finds; test_transformers_4.py runs it for each version.

    python model_folder_reader.py FOLDER OUTPUT

FOLDER holds `base`, and `<name>/merged` and `<name>/final` for each name. OUTPUT, a .safetensors file, gets the logits
and greedy tokens of each, and the version as metadata.
"""

import sys
from pathlib import Path

import torch
import transformers
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

TEXT = "def read(path):\n    with open(path) as file:\n        return file.read()\n\n\n" * 30


@torch.no_grad()
def answers(model, tokenizer, name: str) -> dict[str, torch.Tensor]:
    inputs = tokenizer(TEXT, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=16, do_sample=False)[0]
    return {f"{name}.logits": model(**inputs).logits[0].contiguous(), f"{name}.tokens": tokens}


def main() -> None:
    root, output = map(Path, sys.argv[1:])
    torch.set_num_threads(1)
    found = {}
    for folder in sorted(path.parent for path in root.glob("*/merged")):
        merged = AutoModelForCausalLM.from_pretrained(folder / "merged", dtype=torch.float32).eval()
        found |= answers(merged, AutoTokenizer.from_pretrained(folder / "merged"), f"{folder.name}.merged")
        config = AutoConfig.from_pretrained(folder / "final")
        base = AutoModelForCausalLM.from_pretrained(root / "base", config=config, dtype=torch.float32)
        adapted = PeftModel.from_pretrained(base, folder / "final").eval()
        found |= answers(adapted, AutoTokenizer.from_pretrained(folder / "final"), f"{folder.name}.final")
    save_file(found, output, metadata={"version": transformers.__version__})


if __name__ == "__main__":
    main()
