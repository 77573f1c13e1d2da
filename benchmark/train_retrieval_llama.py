"""Train a tiny base model that reads text and solves passkey retrieval, both within 256 tokens.

    python script/data/python_corpus.py --output_dir output/corpus
    python benchmark/train_retrieval_llama.py --corpus_dir output/corpus --output_dir output/retrieval_llama

The subject of the suites of reproduce.py: perplexity hardly sees what a context method does to retrieval. Goes on from
--base_model (data/tiny-llama) with its vocabulary, but every digit becomes a token of its own, so that a key is copied
digit by digit. A step is --batch_tokens of text from --corpus_dir ({"text": ...} in train.jsonl and validation.jsonl)
and as many of passkey prompts with their answers (train_passkey_llama.py), short ones first. Muon for the layers'
matrices, AdamW for the rest, bf16 autocast where the CPU has it, learning rate constant and then linear to zero.
Writes bf16 safetensors, tokenizer and training.json: loss by position on unseen text and passkey accuracy by depth.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from small_llama import save_model, scheduled_steps, take_step
from tokenizers import pre_tokenizers
from tqdm import tqdm
from train_passkey_llama import CONTEXT, NUM_TEST_TRIALS, TEST_SEED, RowMaker, ask, weighted_loss
from train_tiny_llama import loss_by_position, read_texts, split_parameters, tokenize
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from longqlora.cli import require_file, run_main
from longqlora.device import cpu_has_bf16
from longqlora.evaluation.retrieval.passkey import Passkey
from longqlora.files import atomic_folder, write_json
from longqlora.outputs import OutputFolder, check_outputs

TINY_LLAMA = Path(__file__).resolve().parents[1] / "data" / "tiny-llama"
RECORD = "training.json"
POSITIONS_PER_BLOCK = 32


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a byte-level BPE model, every digit a token of its own; the ids stay what they are."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    backend = tokenizer.backend_tokenizer
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
    return tokenizer


def text_loss(model: LlamaForCausalLM, unseen: np.ndarray) -> dict:
    """Mean loss over windows of the context, and of each block of positions."""
    losses = loss_by_position(model, unseen, CONTEXT)
    blocks = [round(block.mean().item(), 3) for block in losses.split(POSITIONS_PER_BLOCK)]
    return {"mean": losses.mean().item(), f"by_{POSITIONS_PER_BLOCK}_positions": blocks}


def train(model: LlamaForCausalLM, rows: RowMaker, text: np.ndarray, args: argparse.Namespace) -> dict:
    """Train until steps or minutes are used up; returns figures of the run."""
    matrices, rest = split_parameters(model)
    optimizers = [
        torch.optim.Muon(matrices, lr=args.learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    start, num_rows = time.monotonic(), rows.batch_tokens // CONTEXT
    bar = tqdm(total=args.num_steps, unit="step", mininterval=1)
    limits = {"num_steps": args.num_steps, "max_minutes": args.max_minutes}
    for step, progress in scheduled_steps(optimizers, args.learning_rate, **limits):
        starts = rows.generator.integers(0, len(text) - CONTEXT, num_rows)
        of_text = torch.from_numpy(np.stack([text[s : s + CONTEXT] for s in starts]).astype(np.int64))
        ids, weights = rows.batch(rows.longest(progress))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=cpu_has_bf16()):
            losses = model(of_text, labels=of_text).loss, weighted_loss(model(ids).logits, ids, weights)
        take_step(model, sum(losses), optimizers)
        bar.update()
        if (step + 1) % 20 == 0:
            bar.set_postfix(text=f"{losses[0].item():.3f}", passkey=f"{losses[1].item():.3f}")
    bar.close()
    minutes = round((time.monotonic() - start) / 60, 1)
    return {"num_steps": step + 1, "tokens_of_text": (step + 1) * num_rows * CONTEXT, "minutes": minutes}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus_dir", type=Path, required=True, help="folder with train.jsonl and validation.jsonl")
    parser.add_argument("--output_dir", type=Path, required=True, help="new folder for model and tokenizer, or "
                        "one that this script wrote, which is replaced")  # fmt: skip
    parser.add_argument("--model_name_or_path", "--base_model", dest="base_model", type=Path, default=TINY_LLAMA,
                        help="Llama of 256 tokens with a byte-level "
                        "BPE tokenizer (default: %(default)s)")  # fmt: skip
    parser.add_argument("--num_steps", type=int, default=1500, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--max_minutes", type=float, default=15, help="end earlier, with the rate decayed to zero by "
                        "then (default: %(default)s)")  # fmt: skip
    parser.add_argument("--batch_tokens", type=int, default=2048, help="tokens of text in a step, and about as many "
                        "of passkey prompts (default: %(default)s)")  # fmt: skip
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="peak learning rate (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the rows (default: %(default)s)")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.num_steps < 1 or not args.max_minutes > 0 or not args.learning_rate > 0:
        raise ValueError("--num_steps, --max_minutes and --learning_rate: must be above 0")
    if args.batch_tokens < CONTEXT:
        raise ValueError(f"--batch_tokens: must be at least {CONTEXT}, a row of text")
    files = [require_file(args.corpus_dir / f"{name}.jsonl", "--corpus_dir") for name in ("train", "validation")]
    check_outputs({"--output_dir": OutputFolder(args.output_dir, RECORD)},
                  {"--corpus_dir": args.corpus_dir, "--base_model": args.base_model})  # fmt: skip
    torch.manual_seed(args.seed)
    tokenizer = load_tokenizer(args.base_model)
    text, unseen = (tokenize(tokenizer, read_texts(file)) for file in files)
    model = LlamaForCausalLM.from_pretrained(args.base_model, dtype=torch.float32)
    rows = RowMaker(tokenizer, np.random.default_rng(args.seed), args.batch_tokens)
    print(f"{len(text)} tokens of text, passkey prompts of {rows.min_length} to {CONTEXT} tokens")
    before = text_loss(model, unseen)
    figures = train(model, rows, text, args)
    losses = {"text_loss": text_loss(model, unseen), "text_loss_of_base_model": before}
    with atomic_folder(args.output_dir) as folder:
        save_model(model.bfloat16(), tokenizer, folder)
        test = Passkey([128, 192, CONTEXT, 2 * CONTEXT], None, num_trials=NUM_TEST_TRIALS, seed=TEST_SEED)
        record = ask(folder, test)
        settings = {name: getattr(args, name) for name in ("learning_rate", "batch_tokens", "seed")}
        found = {"passkey_seed": TEST_SEED, "passkey": record["cells"]}
        write_json(folder / RECORD, {**settings, **figures, **losses, **found})
    print(losses)
    print(test.table(record))
    print(f"wrote {args.output_dir}")


if __name__ == "__main__":
    run_main(main)
