"""Train a tiny Llama that solves passkey retrieval within its context of 256 tokens, and only there.

    python benchmark/train_passkey_llama.py --output_dir output/passkey_llama
    python script/evaluate/passkey.py --model_name_or_path output/passkey_llama --lengths 128 256 512 1024

A subject for comparing context extension methods on a CPU: it finds the key at every depth of a prompt as
long as its context, and what it does beyond is up to the method. Rows are passkey prompts (retrieval/passkey.py)
with their answer, of random length up to the context, with random keys, depths and filler; half of the rows
have the test's own filler, half shuffled sentences. Lengths start short and grow (AdamW, warm-up and linear
decay, fp32). Writes safetensors, a byte-level BPE tokenizer that keeps digits apart, and
passkey_training.json with the accuracy by length.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from small_llama import random_llama, save_model, scheduled_steps, take_step, train_byte_tokenizer
from tqdm import tqdm
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from longqlora.cli import run_main
from longqlora.evaluation.retrieval.passkey import (
    DESCRIPTION,
    FILLER,
    NEEDLE,
    QUESTION,
    Passkey,
    PasskeyTemplate,
)
from longqlora.files import atomic_folder, write_json
from longqlora.inference.load import load_for_inference
from longqlora.outputs import OutputFolder, check_outputs

CONTEXT, VOCAB_SIZE, BATCH_TOKENS = 256, 512, 2048
RECORD = "passkey_training.json"
NUM_TEST_TRIALS, TEST_SEED = 20, 12345
OTHER_SENTENCES = [
    "The river is long.", "The road is dry.", "The snow is cold.", "A cat sleeps on the chair.", "We walk home.",
    "The moon is far away.", "It rains again.", "The tree is old.", "The bread is warm.", "They sing a song.",
]  # fmt: skip
# Share of a token's loss: the text is easy, the first mention of the key cannot be known, its copies are the task.
TEXT_WEIGHT, COPY_WEIGHT = 0.1, 1.0


def train_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer in which the words of the template are tokens and every digit is one."""
    template = "\n".join([DESCRIPTION, FILLER, NEEDLE.format(key=12345), FILLER, QUESTION])
    # The template counts double, so that its words become tokens before those of the other sentences.
    texts = [template, template, " ".join(OTHER_SENTENCES)]
    return train_byte_tokenizer(texts, vocab_size=VOCAB_SIZE, context=CONTEXT, splits_digits=True)


class RowMaker:
    """Makes training rows: a passkey prompt and its answer, with the weight of each token in the loss."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, generator: np.random.Generator, batch_tokens=BATCH_TOKENS):
        self.tokenizer, self.generator, self.batch_tokens = tokenizer, generator, batch_tokens
        self.template = PasskeyTemplate(tokenizer)
        texts = [f"{sentence}." for sentence in FILLER.rstrip(".").split(". ")] + OTHER_SENTENCES
        self.sentences = [self.template.encode(f" {text}") for text in texts]
        self.digits = [self.template.encode(str(digit))[0] for digit in range(10)]
        self.min_length = self.template.prompt("12345").min_length + len(self.answer("12345"))

    def answer(self, key: str) -> list[int]:
        return [*self.template.encode(f" {key}."), self.tokenizer.eos_token_id]

    def filler(self, num_tokens: int) -> list[int]:
        """Shuffled sentences, cut to `num_tokens`."""
        ids: list[int] = []
        while len(ids) < num_tokens:
            ids += self.sentences[self.generator.integers(len(self.sentences))]
        return ids[:num_tokens]

    def row(self, length: int) -> tuple[list[int], list[float]]:
        """Ids and weights of one row of `length` tokens."""
        random = self.generator
        key = "".join(map(str, [random.integers(1, 10), *random.integers(0, 10, 4)]))
        answer, prompt = self.answer(key), self.template.prompt(key)
        num_filler = length - prompt.min_length - len(answer)
        num_before = int(random.integers(0, num_filler + 1))
        filler = self.template.filler if random.random() < 0.5 else self.filler
        before, after = filler(num_before), filler(num_filler - num_before)
        ids = [*prompt.before, *before, *prompt.needle, *after, *prompt.after, *answer]
        weights = [TEXT_WEIGHT] * len(ids)
        start = len(prompt.before) + num_before
        places = [start + index for index, token in enumerate(prompt.needle) if token in self.digits]
        for place in places:
            weights[place] = 0.0 if place in places[: len(key)] else COPY_WEIGHT
        for place in range(length - len(answer), length):
            weights[place] = COPY_WEIGHT
        return ids, weights

    def longest(self, progress: float) -> int:
        """Length of the longest row at this part of the run: all of the context after a third of it."""
        # Short rows first: retrieval over few tokens forms first.
        return min(CONTEXT, self.min_length + int((CONTEXT - self.min_length) * (0.1 + 3 * progress)))

    def batch(self, longest: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids int64 [B, S] and weights fp32 [B, S] of rows of one random length S, up to `longest` tokens."""
        # The larger of two: far keys are the harder ones, and a short row has none.
        length = int(self.generator.integers(self.min_length, longest + 1, 2).max())
        rows = [self.row(length) for _ in range(max(1, self.batch_tokens // length))]
        return torch.tensor([ids for ids, _ in rows]), torch.tensor([weights for _, weights in rows])


def weighted_loss(logits: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Mean next-token loss in nats, weighted; logits [B, S, V], ids int64 [B, S], weights [B, S]."""
    nll = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    weights = weights[:, 1:].flatten()
    return (nll * weights).sum() / weights.sum()


def ask(model_dir: Path, test: Passkey) -> dict:
    """The record of the passkey test on the saved model."""
    test.use(load_for_inference(str(model_dir), dtype=torch.float32))
    return test.score([test.ask(trial) for trial in tqdm(test.trials(), desc="passkey", unit="trial")])


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="new folder for model and tokenizer, or "
                        "one that this script wrote, which is replaced")  # fmt: skip
    parser.add_argument("--num_steps", type=int, default=2500, help="optimizer steps of 2048 tokens (default: "
                        "%(default)s)")  # fmt: skip
    parser.add_argument("--max_minutes", type=float, default=20, help="end earlier, with the rate decayed to zero by "
                        "then (default: %(default)s)")  # fmt: skip
    parser.add_argument("--learning_rate", type=float, default=2e-3, help="peak learning rate (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and rows (default: %(default)s)")
    return parser.parse_args()


def train(model: LlamaForCausalLM, rows: RowMaker, args: argparse.Namespace) -> dict:
    """Train until steps or minutes are used up; returns figures of the run."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    start = time.monotonic()
    bar = tqdm(total=args.num_steps, unit="step", mininterval=1)
    limits = {"num_steps": args.num_steps, "max_minutes": args.max_minutes}
    for step, progress in scheduled_steps([optimizer], args.learning_rate, **limits):
        longest = rows.longest(progress)
        ids, weights = rows.batch(longest)
        logits = model(ids).logits
        loss = weighted_loss(logits, ids, weights)
        take_step(model, loss, [optimizer])
        bar.update()
        if (step + 1) % 20 == 0:
            is_right = logits.detach()[:, :-1].argmax(-1) == ids[:, 1:]
            copied = is_right[weights[:, 1:] == COPY_WEIGHT].float().mean().item()
            bar.set_postfix(loss=f"{loss.item():.3f}", copied=f"{copied:.3f}", longest=longest)
    bar.close()
    return {"num_steps": step + 1, "minutes": round((time.monotonic() - start) / 60, 1), "last_loss": loss.item()}


def main() -> None:
    args = parse_args()
    if args.num_steps < 1 or not args.max_minutes > 0 or not args.learning_rate > 0:
        raise ValueError("--num_steps, --max_minutes and --learning_rate: must be above 0")
    check_outputs({"--output_dir": OutputFolder(args.output_dir, RECORD)}, {})
    torch.manual_seed(args.seed)
    tokenizer = train_tokenizer()
    model = random_llama(
        tokenizer, hidden_size=128, intermediate_size=384, num_attention_heads=4, num_key_value_heads=4
    )
    rows = RowMaker(tokenizer, np.random.default_rng(args.seed))
    print(f"{sum(p.numel() for p in model.parameters())} parameters, {len(tokenizer)} tokens; rows of "
          f"{rows.min_length} to {CONTEXT} tokens")  # fmt: skip
    figures = train(model, rows, args)
    with atomic_folder(args.output_dir) as folder:
        save_model(model, tokenizer, folder)
        # At five depths, up to twice its context.
        test = Passkey([128, 192, CONTEXT, 2 * CONTEXT], None, num_trials=NUM_TEST_TRIALS, seed=TEST_SEED)
        record = ask(folder, test)
        settings = {"context": CONTEXT, "learning_rate": args.learning_rate, "seed": args.seed}
        found = {"passkey_seed": TEST_SEED, "passkey": record["cells"]}
        write_json(folder / RECORD, {**settings, **figures, **found})
    print(test.table(record))
    print(f"wrote {args.output_dir}")


if __name__ == "__main__":
    run_main(main)
