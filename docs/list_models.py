"""Write docs/models.md: what works with which type of model, tried on tiny random models of the installed transformers.

    python docs/list_models.py [TYPE ...]

With each attention the tiny model of a type is trained for two steps, saved, merged, reloaded with and without the
merge, and evaluated. Without TYPE, all causal language models that use transformers' AttentionInterface and that
docs/results/models.json does not have are tried: a list that was stopped goes on. Named types are tried again.
"""

import argparse
import contextlib
import copy
import json
import os
import re
import sys
import tempfile
import textwrap
from pathlib import Path

from longqlora.cli import run_main
from longqlora.table import page_table

REPO = Path(__file__).resolve().parents[1]
PAGE, RESULTS = REPO / "docs" / "models.md", REPO / "docs" / "results" / "models.json"
ATTENTIONS = ("s2", "full", "dca")
LENGTH, WORDS, LARGEST_MODEL = 48, 60, 2**22
COMMON = {
    "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 32,
    "vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "first_k_dense_replace": 1,
    "max_position_embeddings": 64,
}  # fmt: skip
LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 16, "head_dim": 8,
}  # fmt: skip
MAMBA = {
    "hidden_size": 512, "num_attention_heads": 8, "head_dim": 64, "mamba_n_heads": 16, "mamba_d_head": 64,
    "layer_types": ["mamba", "attention"],
}  # fmt: skip
# What single types need beside the sizes that all have.
OWN = {
    "gpt_neox": {"head_dim": None},
    **dict.fromkeys(
        ("axk1", "axk2", "deepseek_v3", "deepseek_v32", "dots3_note_text", "glm4_moe_lite", "glm_moe_dsa", "minicpm3",
         "youtu"), LATENT,
    ),
    **dict.fromkeys(
        ("gemma4_text", "gemma4_unified_text", "gemma3n_text"),
        {"vocab_size_per_layer_input": 64, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 16,
         "global_head_dim": 32},
    ),
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": dict.fromkeys(
            ("sliding_attention", "full_attention"),
            {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]},
        ),
    },
    "dbrx": {
        "d_model": 64, "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 32},
    },
    "deepseek_v2": {**LATENT, "num_experts_per_tok": 2, "n_routed_experts": 4},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "granitemoehybrid": {**MAMBA, "num_local_experts": 0},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    # Layers of two attentions each.
    "longcat_flash": {**LATENT, "num_layers": 1},
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"]},
    "mistral": {"sliding_window": None},
    "moshi": {"ffn_dim": 32},
    "phi": {},
    "phi4_multimodal": {
        "vision_config": {"hidden_size": 16, "num_attention_heads": 2, "image_size": 56, "crop_size": 56},
        "audio_config": {"hidden_size": 16, "num_attention_heads": 2, "nemo_conv_channels": 16},
    },
    "recurrent_gemma": {"layer_types": [""], "block_types": ["recurrent", "attention"]},
}  # fmt: skip


def parse_command_line() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", metavar="TYPE", help="model types, as in config.json (default: the rest)")
    parser.add_argument("--results", type=Path, help="keep results in this file, and leave the page as it is")
    return parser.parse_args()


def main() -> None:
    args = parse_command_line()
    from tqdm import tqdm

    from longqlora.files import atomic_file, read_json, write_json

    results = args.results or RESULTS
    found = read_json(results) if results.is_file() else {}
    for model_type in tqdm(args.types or [name for name in all_types() if name not in found], file=sys.__stderr__):
        found[model_type] = try_type(model_type)
        write_json(results, dict(sorted(found.items())))
    if args.results:
        return
    text = models_page(dict(sorted(found.items())))
    with atomic_file(PAGE) as file:
        file.write(text)


def all_types() -> list[str]:
    """The types of causal language models that use the AttentionInterface; of what wraps a text model, the latter."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    configs = {name: config for name, config in CONFIG_MAPPING.items() if config in MODEL_FOR_CAUSAL_LM_MAPPING}
    return [
        name
        for name, config in configs.items()
        if getattr(MODEL_FOR_CAUSAL_LM_MAPPING[config], "_supports_attention_backend", False)
        and "text_config" not in config.sub_configs
        and not hasattr(config, "is_decoder")
    ]


def try_type(model_type: str) -> dict:
    """For each attention "" or why not; whether the layer function serves the type; the RoPE methods that do."""
    with tempfile.TemporaryDirectory() as name, open(os.devnull, "w") as nowhere:
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            folder = Path(name)
            try:
                save_tiny_model(model_type, folder / "model")
            except Exception as error:
                return {"no model": one_line(error)}
            row = {attention: try_attention(folder, attention) for attention in ATTENTIONS}
            record = next(folder.glob("*/run_record.json"), None)
            row["layer_function"] = bool(record) and json.loads(record.read_text())["mechanisms"]["layer_function"]
            return {**row, "rope": rope_methods(folder / "model")}


def tiny_config(model_type: str):
    """A narrow config with one layer of each kind that the type has, at least two."""
    from transformers import AutoConfig

    from longqlora.attention.proof import shrink
    from longqlora.model.context import rope_of

    values, stock = COMMON | OWN.get(model_type, {}), AutoConfig.for_model(model_type)
    if rope_of(stock).original_length != getattr(stock, "max_position_embeddings", None):
        # RoPE that comes scaled goes with its length.
        del values["max_position_embeddings"]
    kinds = values.pop("layer_types", None) or getattr(stock, "layer_types", None) or ["", ""]
    kinds = list(dict.fromkeys(kinds)) * (2 if len(set(kinds)) == 1 else 1)
    values |= {"layer_types": kinds} if kinds[0] else {}
    values |= {} if "num_layers" in values else {"num_hidden_layers": len(kinds)}
    config = AutoConfig.for_model(model_type, **values)
    shrink(config)
    return config


def save_tiny_model(model_type: str, folder: Path) -> None:
    """The model with random weights, a tokenizer of as many words, and rows to train on."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    config = tiny_config(model_type)
    with torch.device("meta"):
        if AutoModelForCausalLM.from_config(copy.deepcopy(config)).num_parameters() > LARGEST_MODEL:
            raise ValueError("no small model of it is known here")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    words = [*special.values(), *(f"w{index}" for index in range(WORDS))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    rows = [" ".join(f"w{(7 * row + step**2) % WORDS}" for step in range(2 * LENGTH)) for row in range(8)]
    (folder.parent / "train.jsonl").write_text("\n".join(json.dumps({"text": row}) for row in rows))


def try_attention(folder: Path, attention: str) -> str:
    """Train two steps, merge and evaluate; "" or in one line what is against it."""
    import torch

    from longqlora.inference.load import load_for_inference
    from longqlora.model.merge import merge

    output, ids = folder / attention, torch.arange(4, 4 + LENGTH // 2)[None]
    try:
        train(folder, output, attention)
        merge(None, str(output / "final"), output / "merged")
        with torch.no_grad():
            live, merged = (
                load_for_inference(base, adapter_name_or_path=adapter, dtype=torch.float32).model(input_ids=ids).logits
                for base, adapter in ((None, str(output / "final")), (str(output / "merged"), None))
            )
    except Exception as error:
        return one_line(error)
    return "" if torch.allclose(live, merged, atol=1e-3) else "merged it computes something else"


def train(folder: Path, output: Path, attention: str) -> None:
    """What `train.py` does, in this process."""
    import yaml

    sys.path.insert(0, str(REPO))
    import train

    values = {
        "model_name_or_path": str(folder / "model"), "train_file": str(folder / "train.jsonl"), "max_steps": 2,
        "output_dir": str(output), "data_cache_dir": str(folder / "cache"), "finetuning_type": "lora", "lora_rank": 2,
        "max_seq_length": LENGTH, "attention": attention, "memory": "balanced", "save_strategy": "no",
        "learning_rate": 1e-3, "logging_steps": 1, "report_to": "none", "train_norm": True, "pack": False,
    }  # fmt: skip
    if attention == "dca":
        values |= {"pretraining_length": 32, "model_max_length": LENGTH}
    path = output.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(values))
    sys.argv = ["train.py", "--train_args_file", str(path)]
    train.main()


def rope_methods(folder: Path) -> list[str]:
    """The methods by which the model in `folder` reads on, and then computes; "own": that which it comes with."""
    import torch
    from transformers import AutoModelForCausalLM

    from longqlora.model.base import load_config
    from longqlora.model.context import context_length, extend_rope
    from longqlora.settings.config import ROPE_TYPES

    found = []
    for rope_type in (*ROPE_TYPES, None):
        try:
            config = load_config(str(folder))
            extend_rope(config, 4 * context_length(config), rope_type, 5e5 if rope_type == "theta" else None)
            with torch.no_grad():
                logits = AutoModelForCausalLM.from_config(config)(torch.arange(4, 104)[None] % WORDS).logits
            found += [rope_type or "own"] if logits.isfinite().all() else []
        except Exception:
            continue
    return found


def one_line(error: Exception) -> str:
    text = str(error) if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {error}"
    # The folder has another name each time.
    return textwrap.shorten(re.sub(r"'/[^']*/model'", "the model", text), 300, placeholder=" ...")


def models_page(found: dict[str, dict]) -> str:
    """The text of docs/models.md: its head as it is, then the tables."""
    from longqlora.settings.config import ROPE_TYPES

    rows, others = [], []
    for model_type, row in found.items():
        if "no model" in row or all(row[attention] for attention in ATTENTIONS):
            reason = short(row.get("no model") or row["full"])
            others.append((f"`{model_type}`", reason))
            continue
        cells = ["no" if row[attention] else "yes" for attention in ATTENTIONS]
        rope = "all" if {*row["rope"]} >= {*ROPE_TYPES} else ", ".join(row["rope"]) or "none"
        reasons = dict.fromkeys(short(row[attention]) for attention in ATTENTIONS if row[attention])
        rows.append((f"`{model_type}`", *cells, "yes" if row["layer_function"] else "no", rope, "; ".join(reasons)))
    head = PAGE.read_text(encoding="utf-8").split("\n## ")[0]
    columns = ("type", *ATTENTIONS, "layer function", "RoPE methods", "why not")
    trained, rest = page_table(columns, rows), page_table(("type", "why not"), others)
    return f"{head}\n## Types that train\n\n{trained}\n## Others\n\n{rest}"


def short(reason: str) -> str:
    """The cause in `reason`, without setting, model type and advice."""
    cause = re.sub(r"^.*? does not suit [\w-]+: |^([a-z_]+: )+| \(of \d+ tokens\)|; [^;]*$", "", reason)
    return re.sub(r"^[\w-]+ (?=has|does|uses|takes)", "", cause)


if __name__ == "__main__":
    run_main(main)
