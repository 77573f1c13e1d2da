"""Train the small base model that ships in data/tiny-llama (2.4M parameters, 256 tokens of context).

    python script/data/python_corpus.py --output_dir output/base_corpus --packages
    python benchmark/train_tiny_llama.py --corpus_dir output/base_corpus --output_dir data/tiny-llama

Trains a byte-level BPE tokenizer (Llama's BOS and EOS, a pad token of its own) and a Llama from
random weights: Muon for the matrices of the layers, AdamW for the rest, bf16 autocast where the CPU has it,
learning rate constant and then linear to zero. The run ends at --num_tokens or --max_minutes, whichever is
first; the schedule follows the nearer of the two. Writes bf16 safetensors, tokenizer and
training.json (figures for the model card, loss by position on unseen files).
"""

import argparse
import json
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from small_llama import random_llama, save_model, scheduled_steps, take_step, train_byte_tokenizer
from tqdm import tqdm
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from longqlora.cli import require_file, run_main
from longqlora.data.jsonl import read_rows
from longqlora.data.row import text_of_row
from longqlora.device import cpu_has_bf16
from longqlora.files import partial_name
from longqlora.outputs import OutputFolder, check_outputs
from longqlora.settings.config import check_limit

CONTEXT, VOCAB_SIZE, BATCH_SIZE = 256, 2048, 16
RECORD = "training.json"
# A token of the tokenizer that is trained here has four characters on average; windows of 4 x CONTEXT are read.
MIN_CHARACTERS = 100 * CONTEXT
LIMIT = "above 0 and at most 1e15", lambda value: 0 < value <= 1e15


def read_texts(path: Path) -> list[str]:
    with require_file(path, "--corpus_dir").open("rb") as file:
        texts = [text for _, text in read_rows(file, path, flag="--corpus_dir", parse=text_of_row)]
    if sum(map(len, texts)) < MIN_CHARACTERS:
        raise ValueError(f"--corpus_dir: {str(path)!r} has fewer than {MIN_CHARACTERS} characters; give more")
    return texts


def tokenize(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> np.ndarray:
    """All documents as one array of ids, each from BOS to EOS."""
    ids = []
    for start in tqdm(range(0, len(texts), 256), desc="tokenize"):
        for row in tokenizer(texts[start : start + 256])["input_ids"]:
            ids.append(np.array(row + [tokenizer.eos_token_id], dtype=np.uint16))
    return np.concatenate(ids)


def split_parameters(model: LlamaForCausalLM) -> tuple[list, list]:
    matrices = [p for n, p in model.named_parameters() if "layers" in n and p.ndim == 2]
    return matrices, [p for n, p in model.named_parameters() if not ("layers" in n and p.ndim == 2)]


@torch.no_grad()
def loss_by_position(model: LlamaForCausalLM, ids: np.ndarray, length: int, num_windows: int = 128) -> torch.Tensor:
    """Mean loss of each predicted position over windows spread evenly through unseen text."""
    model.eval()
    starts = np.linspace(0, len(ids) - length - 1, num_windows).astype(int)
    total = torch.zeros(length - 1)
    for start in starts:
        row = torch.from_numpy(ids[start : start + length].astype(np.int64))[None]
        logits = model(row).logits[0, :-1].float()
        total += torch.nn.functional.cross_entropy(logits, row[0, 1:], reduction="none")
    model.train()
    return total / num_windows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus_dir", type=Path, required=True, help="folder with train.jsonl and validation.jsonl")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for the model")
    parser.add_argument("--num_tokens", type=float, default=60e6, help="tokens to train on (default: %(default)s)")
    parser.add_argument(
        "--max_minutes", type=float, default=240, help="end sooner after so many minutes (default: %(default)s)"
    )
    parser.add_argument("--learning_rate", type=float, default=3e-3, help="of Muon and AdamW (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (default: %(default)s)")
    args = parser.parse_args()
    check_outputs({"--output_dir": OutputFolder(args.output_dir, RECORD)}, {"--corpus_dir": args.corpus_dir})
    torch.manual_seed(args.seed)
    generator = np.random.default_rng(args.seed)

    for name in ("num_tokens", "max_minutes", "learning_rate"):
        check_limit(f"--{name}", getattr(args, name), LIMIT)
    texts, of_validation = (read_texts(args.corpus_dir / f"{name}.jsonl") for name in ("train", "validation"))
    some = [texts[i] for i in generator.permutation(len(texts))[:3000]]
    tokenizer = train_byte_tokenizer(some, vocab_size=VOCAB_SIZE, context=CONTEXT)
    ids = tokenize(tokenizer, texts)
    unseen = tokenize(tokenizer, of_validation)
    sizes = {"hidden_size": 192, "intermediate_size": 512, "num_attention_heads": 6, "num_key_value_heads": 2}
    model = random_llama(tokenizer, **sizes)
    matrices, rest = split_parameters(model)
    optimizers = [
        torch.optim.Muon(matrices, lr=args.learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    print(f"{sum(p.numel() for p in model.parameters())} parameters, {len(ids)} training tokens")

    def save(final_figures: dict) -> None:
        partial = partial_name(args.output_dir)
        shutil.rmtree(partial, ignore_errors=True)
        halved = LlamaForCausalLM.from_pretrained(None, config=model.config, state_dict=model.state_dict()).bfloat16()
        save_model(halved, tokenizer, partial)
        (partial / RECORD).write_text(json.dumps(final_figures, indent=1) + "\n")
        args.output_dir.mkdir(parents=True, exist_ok=True)
        for file in partial.iterdir():
            file.replace(args.output_dir / file.name)
        partial.rmdir()

    def figures() -> dict:
        inside = loss_by_position(model, unseen, CONTEXT)
        beyond = loss_by_position(model, unseen, 4 * CONTEXT)
        return {
            "tokens_seen": num_taken * BATCH_SIZE * CONTEXT, "minutes": round((time.monotonic() - start) / 60, 1),
            "seed": args.seed, "learning_rate": args.learning_rate, "validation_loss_256": inside.mean().item(),
            "validation_loss_1024": beyond.mean().item(), "loss_by_32_positions_256": block_means(inside),
            "loss_by_128_positions_1024": block_means(beyond, 128),
        }  # fmt: skip

    def block_means(losses: torch.Tensor, size: int = 32) -> list[float]:
        return [round(block.mean().item(), 3) for block in losses.split(size)]

    start = last_report = time.monotonic()
    num_steps, num_taken = args.num_tokens / (BATCH_SIZE * CONTEXT), 0
    bar = tqdm(total=int(args.num_tokens), unit="tok")
    schedule = scheduled_steps(optimizers, args.learning_rate, num_steps=num_steps, max_minutes=args.max_minutes)
    for step, _ in schedule:
        starts = generator.integers(0, len(ids) - CONTEXT, BATCH_SIZE)
        rows = torch.from_numpy(np.stack([ids[s : s + CONTEXT] for s in starts]).astype(np.int64))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=cpu_has_bf16()):
            loss = model(rows, labels=rows).loss
        take_step(model, loss, optimizers)
        num_taken = step + 1
        bar.update(BATCH_SIZE * CONTEXT)
        if num_taken % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}", lr=f"{optimizers[0].param_groups[0]['lr']:.1e}")
        if time.monotonic() - last_report > 600:
            save(figures())
            last_report = time.monotonic()
            tqdm.write(json.dumps(figures()))
    save(figures())
    print(json.dumps(figures(), indent=1))


if __name__ == "__main__":
    run_main(main)
