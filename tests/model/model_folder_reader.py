"""Read model folders with the transformers that this process finds; test_saved_folder.py runs it for each version.

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

root, output = map(Path, sys.argv[1:])
torch.set_num_threads(1)
found = {}
for folder in [*root.glob("*/merged"), *root.glob("*/final")]:
    is_adapter = folder.name == "final"
    source, config = root / "base" if is_adapter else folder, AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(source, config=config, dtype=torch.float32)
    model = (PeftModel.from_pretrained(model, folder) if is_adapter else model).eval()
    inputs = AutoTokenizer.from_pretrained(folder)(TEXT, return_tensors="pt")
    with torch.no_grad():
        name = f"{folder.parent.name}.{folder.name}"
        found[f"{name}.tokens"] = model.generate(**inputs, max_new_tokens=16, do_sample=False)[0]
        found[f"{name}.logits"] = model(**inputs).logits[0].contiguous()
save_file(found, output, metadata={"version": transformers.__version__})
