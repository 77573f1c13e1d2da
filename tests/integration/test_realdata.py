"""The method on texts and a model that nobody here made: stories260K stretched four times on PG-19 books.

Needs ../shared/data beside the checkout; skipped where it is absent.
"""

import gzip
import json

import pytest

pytestmark = pytest.mark.realdata
LENGTHS = (512, 1024, 1536, 2048)


@pytest.fixture(scope="module")
def books(shared_data, tmp_path_factory):
    """Training jsonl from four books and one validation book as plain text."""
    folder = tmp_path_factory.mktemp("books")
    train = sorted((shared_data / "pg19" / "train").glob("*.txt.gz"))[:4]
    rows = [{"text": gzip.decompress(path.read_bytes()).decode("utf-8").replace("\r\n", "\n")} for path in train]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    text = (shared_data / "pg19" / "validation" / "1022.txt").read_bytes()
    (folder / "validation.txt").write_bytes(text[:200_000])
    return folder


def test_books_perplexity_base_interpolated_trained(shared_data, books, run_script):
    base, ids, out = shared_data / "stories260k" / "hf", books / "validation.bin", books / "adapter"
    options = ["--input", books / "validation.txt", "--tokenizer", base, "--output_file", ids]
    run_script("script/data/tokenize_corpus.py", *options, check=True)
    settings = {
        "model_name_or_path": base, "train_file": books / "train.jsonl", "output_dir": out, "attention": "s2",
        "data_cache_dir": books / "cache", "model_max_length": 2048, "max_seq_length": 2048, "lora_rank": 16,
        "train_embedding": True, "train_norm": True, "pack": True, "max_steps": 25, "per_device_train_batch_size": 2,
        "learning_rate": "3e-3", "logging_steps": 5, "save_strategy": "no", "report_to": "none",
    }  # fmt: skip
    (books / "run.yaml").write_text(json.dumps(settings, default=str))
    run_script("train.py", "--train_args_file", books / "run.yaml", check=True, timeout=300)

    def measure(name, *arguments):
        output = books / f"{name}.json"
        protocol = ["--seq_len", *LENGTHS, "--sliding_window", 2048, "--max_windows", 8, "--output_file", output]
        model = ["--base_model", base, "--load_in_4bit", *arguments]
        run_script("script/evaluate/evaluate.py", "--data_path", ids, *protocol, *model, check=True)
        return {result["seq_len"]: result["loss"] for result in json.loads(output.read_text())["results"]}

    losses = {
        "base": measure("base"),
        "interpolated": measure("interpolated", "--context_size", 2048),
        "trained": measure("trained", "--peft_model", out / "final"),
    }
    print("\n" + json.dumps(losses, indent=1))
    # Not in stories260K's language: the base explodes only a little past its 512 tokens, and interpolation
    # without training costs more than it gives. Trained, the longer window no longer hurts.
    assert losses["base"][2048] > losses["base"][1024]
    assert losses["interpolated"][512] > losses["base"][512] + 0.2
    assert losses["trained"][2048] < min(losses["base"][2048], losses["interpolated"][2048]) - 0.5
    assert losses["trained"][2048] < losses["trained"][512] + 0.1
