"""Where results may go: nothing that a command reads, nothing that is not its own, and refused before any work."""

import json
import os
import re
import shutil
import stat
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import Mock

import pytest
from conftest import REPO

from longqlora.outputs import OutputFolder, check_outputs

# A valid command without its output, and places of its --output_file, or of another flag, that are refused.
COMMANDS = {
    "script/evaluate/evaluate.py --base_model model --data_path ids.bin --seq_len 8":
        {"--output_file": "ids.bin ids.bin.json model/config.json link hard", "--plot": "link.png"},
    "script/evaluate/compare.py --compare_args_file compare.yaml":
        {"--output_file": "compare.yaml ids.bin ids.bin.json model/new.json", "--plot": "link.png"},
    "script/evaluate/needle.py --model_name_or_path model --haystack texts": {"--output_file": "texts/a.txt"},
    "script/evaluate/passkey.py --adapter_name_or_path adapter":
        {"--output_file": "adapter/adapter_config.json model/config.json"},
    "script/evaluate/ruler.py --model_name_or_path model --tasks vt niah_single_2 --haystack text.txt":
        {"--output_file": "text.txt", "--plot": "model/x.png"},
    "script/evaluate/longtask.py --model_name_or_path model --data_path rows.jsonl --metric f1":
        {"--output_file": "rows.jsonl", "--plot": "model/x.png"},
    "script/inference/inference.py --model_name_or_path model --input_file answers.jsonl.partial --overwrite":
        {"--output_file": "answers.jsonl answers.jsonl.partial model/new.jsonl"},
    "script/merge_lora.py --adapter_name_or_path adapter --context_size 128 --overwrite":
        {"--save_path": "model adapter adapter/new . full"},
    "script/data/tokenize_corpus.py --input texts text.txt --tokenizer model":
        {"--output_file": "text.txt texts/a.txt texts/new.bin model/config", "--plot": "link.png"},
    "script/data/extract_text.py --input text.txt texts": {"--output_file": "text.txt texts/a.txt texts/new.jsonl"},
    "script/data/python_corpus.py": {"--output_dir": "full text.txt"},
    "script/data/remove_overlap.py --train_file train.jsonl --eval_file eval.jsonl":
        {"--output_dir": "full text.txt train.jsonl"},
    "script/plan_memory.py --train_args_file train.yaml --gpu_memory 32GiB":
        {"--output_file": "train.yaml train.jsonl model/config.json"},
    "script/demo.py": {"--output_dir": "full text.txt"},
    "benchmark/train_tiny_llama.py --corpus_dir corpus --num_tokens 1":
        {"--output_dir": "corpus full corpus/model text.txt"},
    "benchmark/train_passkey_llama.py --num_steps 1": {"--output_dir": "full model . text.txt"},
    "benchmark/train_retrieval_llama.py --corpus_dir corpus --base_model model":
        {"--output_dir": "corpus full corpus/model model text.txt"},
    "benchmark/reproduce.py --suite recipe --books corpus": {"--output_dir": "corpus full text.txt"},
    "benchmark/attention.py": {}, "benchmark/dual_chunk_attention.py": {}, "benchmark/layer_memory.py": {},
    "benchmark/longest.py --memory_cap 1GiB": {},
    "benchmark/prefill.py --shape model/config.json": {"--output_file": "model/config.json"},
    "benchmark/train_step.py --shape model/config.json": {"--output_file": "model/config.json"},
}  # fmt: skip
# The evaluation scripts take --output_file and --plot from their common frame.
FRAME = r"add_result_arguments|evaluate\(__doc__"
CASES = []
for command, refusals in COMMANDS.items():
    everywhere = {} if {*refusals} & {"--output_dir", "--save_path"} else {"--output_file": "full pipe"}
    CASES += [(command, flag, x) for places in (refusals, everywhere) for flag in places for x in places[flag].split()]
    # Two results of a command have two places.
    if re.search(f'"--plot"|{FRAME}', (REPO / command.split()[0]).read_text()) and "train_step" not in command:
        CASES.append((f"{command} --output_file same.png", "--plot", "same.png"))


def test_every_script_that_writes_is_in_the_table():
    flags = rf'add_argument\(\s*"--(output_file|output_dir|save_path|plot)"|{FRAME}'
    scripts = [*(REPO / "script").rglob("*.py"), *(REPO / "benchmark").glob("*.py")]
    writing = {str(path.relative_to(REPO)) for path in scripts if re.search(flags, path.read_text())}
    assert writing == {command.split()[0] for command in COMMANDS}


# What the commands begin their work with.
WORK = (
    "torch.nn.Module.__call__", "transformers.PreTrainedModel.from_pretrained",
    "transformers.PreTrainedTokenizerBase.from_pretrained", "longqlora.model.merge.read_updates",
    "longqlora.memory.plan.MemoryPlan.table", "subprocess.Popen", "importlib.metadata.distributions",
    "longqlora.data.documents.read_document", "sysconfig.get_python_version",
)  # fmt: skip


@pytest.fixture
def work(tmp_path, tiny_model_dir, monkeypatch) -> Path:
    """The working directory, with an input of every kind."""
    from longqlora.data.token_file import write_token_file

    shutil.copytree(tiny_model_dir, tmp_path / "model")
    for name, text in {
        "adapter/adapter_config.json": json.dumps({"peft_type": "LORA", "base_model_name_or_path": "model"}),
        "text.txt": "A text. Another one.",
        "texts/a.txt": "A text. Another one.",
        "answers.jsonl.partial": '{"prompt": "a"}\n',
        "rows.jsonl": '{"context": "a", "question": "b", "references": ["c"]}\n',
        "corpus/train.jsonl": '{"text": "a"}\n',
        "corpus/validation.jsonl": '{"text": "a"}\n',
        "full/thesis.txt": "the only copy",
        "train.jsonl": '{"text": "a"}\n',
        "train.yaml": "model_name_or_path: ./model\ntrain_file: train.jsonl\noutput_dir: out\nmax_seq_length: 64\n",
        "compare.yaml": "base_model: ./model\ndata_path: ids.bin\nlengths: [8]\nmethods: {none: {}}\n",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    write_token_file(tmp_path / "ids.bin", [range(64)], tokenizer_name="model", vocab_size=320)
    (tmp_path / "link").symlink_to("ids.bin")
    (tmp_path / "hard").hardlink_to(tmp_path / "ids.bin")
    (tmp_path / "link.png").symlink_to("text.txt" if "tokenize" in os.environ["PYTEST_CURRENT_TEST"] else "ids.bin")
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def state(folder: Path) -> dict:
    """What stands in `folder`, with the contents of files."""
    paths = {path: path.lstat().st_mode for path in sorted(folder.rglob("*"))}
    return {path: (mode, path.read_bytes() if stat.S_ISREG(mode) else None) for path, mode in paths.items()}


@pytest.mark.parametrize("command,flag,place", CASES, ids=[f"{Path(c.split()[0]).stem}-{f}-{p}" for c, f, p in CASES])
def test_a_result_never_lands_on_what_is_not_its_own(work, run_in_process, monkeypatch, command, flag, place):
    """Nor on another result of the command; nothing was done before that is said."""
    for target in WORK:
        monkeypatch.setattr(target, Mock(side_effect=AssertionError("the work began")))
    before = state(work)
    needed = "--output_file x.bin" if flag == "--plot" and "--output_file" not in command else ""
    code, _, error = run_in_process(*f"{command} {needed} {flag} {place}".split())
    assert code == 2 and error.startswith(f"error: {flag}: '{place}") and error.count("\n") == 1, error
    assert place != "same.png" or "overlaps 'same.png', which --output_file writes" in error
    assert state(work) == before


SPECIAL, IS_READ = "is a device, pipe or socket", "which --i reads"


def folder(path: str, **options) -> OutputFolder:
    return OutputFolder(path, "mark", **options)


# Outputs (alone: of --o), inputs (of --i), words of the error; none where it is allowed.
PLACES = [
    # New, an earlier result, nothing asked, a name of the hub, of nobody's home, and one that only begins alike.
    ("new/sub/x.json", "ids.bin", ""), ("old.json", ["ids.bin", "texts"], ""), (None, None, ""),
    ("x.json", "meta-llama/Llama-2-7b-hf", ""), ("x.json", "~no-such-user/x", ""), ("ids", "ids.bin", ""),
    ("texts.json", "texts", ""),
    # No plain file, or nowhere to write.
    ("texts", None, "'texts' is a folder"), (".", None, "is a folder"), ("pipe", None, SPECIAL),
    ("/dev/null", None, SPECIAL), ("/dev/stdout", None, SPECIAL), ("to_null", None, SPECIAL),
    ("ids.bin/x.json", None, "cannot write in 'ids.bin' (Not a directory)"),
    ("/proc/absent/x.json", None, "cannot write in '/proc/absent'"),
    ("~/x.json", None, "would be a folder named '~'; write '/"),
    ("x" * 250, None, "cannot write in '.' (File name too long)"),
    # What is read, in another spelling, behind links, or in a folder of it.
    ("texts/../ids.bin", "ids.bin", "overlaps 'ids.bin', which --i reads"), ("link", "ids.bin", IS_READ),
    ("ids.bin", "link", IS_READ), ("hard", "ids.bin", IS_READ), ("linked/a.txt", "texts/a.txt", IS_READ),
    ("linked/new.json", "texts", IS_READ),
    # The hidden names beside an output: temporary, the same as a link, finished trials.
    ("x", ".x.partial", IS_READ), ("y", "ids.bin", IS_READ), ("x", ".x.trials-0.jsonl", IS_READ),
    # Two outputs.
    ({"--o": "new.json", "--p": "./new.json"}, None, "--p: 'new.json' overlaps 'new.json', which --o"),
    ({"--o": ["a.bin", "a.bin.json"], "--p": "a.bin.json"}, None, "--p: 'a.bin.json'"),
    ({"--p": ".a.partial", "--o": "a"}, None, "overlaps"), ({"--o": "a", "--p": ".a.partial"}, None, "overlaps"),
    # Folders: new, empty, the command's own, one of others, a file, around and within what is read.
    (folder("new/sub"), "texts", ""), (folder("empty"), None, ""), (folder("own"), None, ""),
    (folder("own", overwrite=False), None, "not empty; c"), (folder("texts"), None, "no folder of this command (mark"),
    (folder("ids.bin"), None, "is a file; give the path of a folder"), (folder("own"), "own/mark", IS_READ),
    (folder("texts/new"), "texts", IS_READ), (folder("."), None, "has no name of its own"),
]  # fmt: skip


@pytest.mark.parametrize("outputs,inputs,words", PLACES, ids=lambda value: str(value)[:40])
def test_places(work, outputs, inputs, words):
    outputs = outputs if isinstance(outputs, dict) else {"--o": outputs}
    for file in (".x.partial", ".x.trials-0.jsonl", "old.json"):
        Path(file).write_text("{}")
    for folder in ("empty", "own"):
        Path(folder).mkdir()
    Path("own/mark").touch()
    Path("linked").symlink_to("texts")
    Path(".y.partial").symlink_to("ids.bin")
    Path("to_null").symlink_to("/dev/null")
    before = state(work)
    with pytest.raises(ValueError, match=re.escape(words)) if words else nullcontext():
        check_outputs(outputs, {"--i": inputs})
    assert state(work) == before, "a check writes nothing"
