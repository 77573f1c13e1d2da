"""Where results may go: nothing that a command reads, nothing that is not its own, and refused before any work."""

import json
import os
import re
import runpy
import shutil
import stat
import sys
from pathlib import Path

import pytest
from conftest import REPO

from longqlora.outputs import OutputFolder, check_outputs

MODEL = ["--model_name_or_path", "model"]
FOLDER_FLAGS = ("--output_dir", "--save_path")
# script: (a valid command without its output, places of --output_file, or another flag, that are refused)
COMMANDS = {
    "script/evaluate/evaluate.py": (
        ["--base_model", "model", "--data_path", "ids.bin", "--seq_len", "8"],
        {"--output_file": "ids.bin ids.bin.json model/config.json link hard", "--plot": "link.png"},
    ),
    "script/evaluate/compare.py": (
        ["--compare_args_file", "compare.yaml"],
        {"--output_file": "compare.yaml ids.bin ids.bin.json model/new.json", "--plot": "link.png"},
    ),
    "script/evaluate/needle.py": ([*MODEL, "--haystack", "texts"], {"--output_file": "texts/a.txt"}),
    "script/evaluate/passkey.py": (
        ["--adapter_name_or_path", "adapter"], {"--output_file": "adapter/adapter_config.json model/config.json"},
    ),
    "script/evaluate/ruler.py": (
        [*MODEL, "--tasks", "vt", "niah_single_2", "--haystack", "text.txt"],
        {"--output_file": "text.txt", "--plot": "model/x.png"},
    ),
    "script/evaluate/longtask.py": (
        [*MODEL, "--data_path", "rows.jsonl", "--metric", "f1"],
        {"--output_file": "rows.jsonl", "--plot": "model/x.png"},
    ),
    "script/inference/inference.py": (
        [*MODEL, "--input_file", "answers.jsonl.partial", "--overwrite"],
        {"--output_file": "answers.jsonl answers.jsonl.partial model/new.jsonl"},
    ),
    "script/merge_lora.py": (
        ["--adapter_name_or_path", "adapter", "--context_size", "128", "--overwrite"],
        {"--save_path": "model adapter adapter/new . full"},
    ),
    "script/data/tokenize_corpus.py": (
        ["--input", "texts", "text.txt", "--tokenizer", "model"],
        {"--output_file": "text.txt texts/a.txt texts/new.bin model/config", "--plot": "link.png"},
    ),
    "script/data/extract_text.py": (
        ["--input", "text.txt", "texts"], {"--output_file": "text.txt texts/a.txt texts/new.jsonl"},
    ),
    "script/data/python_corpus.py": ([], {"--output_dir": "full text.txt"}),
    "benchmark/train_tiny_llama.py": (
        ["--corpus_dir", "corpus", "--num_tokens", "1"], {"--output_dir": "corpus full corpus/model text.txt"},
    ),
    "benchmark/train_passkey_llama.py": (["--num_steps", "1"], {"--output_dir": "full model . text.txt"}),
    "script/plan_memory.py": (
        ["--train_args_file", "train.yaml", "--gpu_memory", "32GiB"],
        {"--output_file": "train.yaml train.jsonl model/config.json"},
    ),
    "script/demo.py": ([], {"--output_dir": "full text.txt"}),
    "benchmark/attention.py": ([], {}),
    "benchmark/dual_chunk_attention.py": ([], {}),
    "benchmark/layer_memory.py": ([], {}),
    "benchmark/longest.py": (["--memory_cap", "1GiB"], {}),
    "benchmark/prefill.py": (["--shape", "model/config.json"], {"--output_file": "model/config.json"}),
    "benchmark/train_step.py": (["--shape", "model/config.json"], {"--output_file": "model/config.json"}),
}  # fmt: skip
# The evaluation scripts take --output_file and --plot from their common frame.
FRAME = r"add_result_arguments|evaluate\(__doc__"
WITH_PLOT = [name for name in COMMANDS if re.search(f'"--plot"|{FRAME}', (REPO / name).read_text())
             and name != "benchmark/train_step.py"]  # fmt: skip
CASES = []
for name, (_, refusals) in COMMANDS.items():
    everywhere = {} if {*refusals} & {*FOLDER_FLAGS} else {"--output_file": "full pipe"}
    CASES += [(name, flag, x) for places in (refusals, everywhere) for flag in places for x in places[flag].split()]


def test_every_script_that_writes_is_in_the_table():
    flags = rf'add_argument\(\s*"--(output_file|output_dir|save_path|plot)"|{FRAME}'
    scripts = [*(REPO / "script").rglob("*.py"), *(REPO / "benchmark").glob("*.py")]
    assert {str(path.relative_to(REPO)) for path in scripts if re.search(flags, path.read_text())} == set(COMMANDS)


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


@pytest.fixture
def refused(work, monkeypatch, capsys):
    """Run a script in `work`; returns its error line after checking that it did nothing."""

    def started(*args, **kwargs):
        raise AssertionError("the work began")

    def run(name: str, *words: str) -> str:
        for target in WORK:
            monkeypatch.setattr(target, started)
        monkeypatch.setattr(sys, "argv", [name, *words])
        before = state(work)
        with pytest.raises(SystemExit) as outcome:
            runpy.run_path(str(REPO / name), run_name="__main__")
        error = capsys.readouterr().err
        assert outcome.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
        assert state(work) == before
        return error

    return run


@pytest.mark.parametrize(("name", "flag", "place"), CASES, ids=[f"{Path(n).stem}-{f}-{p}" for n, f, p in CASES])
def test_a_result_never_lands_on_what_is_not_its_own(refused, name, flag, place):
    words = COMMANDS[name][0]
    needed = ["--output_file", "x.bin"] if "tokenize" in name and flag == "--plot" else []
    error = refused(name, *words, *needed, flag, place)
    assert error.startswith(f"error: {flag}: '{place}") and "Traceback" not in error


@pytest.mark.parametrize("name", WITH_PLOT)
def test_two_results_of_a_command_have_two_places(refused, name):
    error = refused(name, *COMMANDS[name][0], "--output_file", "same.png", "--plot", "./same.png")
    assert "--plot: 'same.png' overlaps 'same.png', which --output_file writes" in error


# name: (outputs, inputs, words of the error; none where it is allowed)
PLACES = {
    "new file": ({"--o": "new/sub/x.json"}, {"--i": "ids.bin"}, None),
    "earlier result": ({"--o": "old.json"}, {"--i": ["ids.bin", "texts"]}, None),
    "nothing asked": ({"--o": None, "--p": None}, {"--i": None}, None),
    "hub name": ({"--o": "x.json"}, {"--i": "meta-llama/Llama-2-7b-hf"}, None),
    "name that only begins alike": ({"--o": "ids"}, {"--i": "ids.bin"}, None),
    "beside what is read": ({"--o": "texts.json"}, {"--i": "texts"}, None),
    "folder": ({"--o": "texts"}, {}, "'texts' is a folder"),
    "here": ({"--o": "."}, {}, "is a folder"),
    "pipe": ({"--o": "pipe"}, {}, "is a device, pipe or socket"),
    "device": ({"--o": "/dev/null"}, {}, "is a device, pipe or socket"),
    "stdout": ({"--o": "/dev/stdout"}, {}, "is a device, pipe or socket"),
    "link to a device": ({"--o": "to_null"}, {}, "is a device, pipe or socket"),
    "below a file": ({"--o": "ids.bin/x.json"}, {}, "cannot write in 'ids.bin' (Not a directory)"),
    "kernel": ({"--o": "/proc/absent/x.json"}, {}, "cannot write in '/proc/absent'"),
    "home": ({"--o": "~/x.json"}, {}, "would be a folder named '~'; write '/"),
    "home of nobody": ({"--o": "x.json"}, {"--i": "~no-such-user/x"}, None),
    "long name": ({"--o": "x" * 250}, {}, "cannot write in '.' (File name too long)"),
    "dotted spelling": ({"--o": "texts/../ids.bin"}, {"--i": "ids.bin"}, "overlaps 'ids.bin', which --i reads"),
    "link to the input": ({"--o": "link"}, {"--i": "ids.bin"}, "overlaps"),
    "input is a link": ({"--o": "ids.bin"}, {"--i": "link"}, "overlaps"),
    "hard link": ({"--o": "hard"}, {"--i": "ids.bin"}, "overlaps"),
    "through a linked folder": ({"--o": "linked/a.txt"}, {"--i": "texts/a.txt"}, "overlaps"),
    "inside a folder": ({"--o": "linked/new.json"}, {"--i": "texts"}, "overlaps"),
    "temporary name": ({"--o": "x"}, {"--i": ".x.partial"}, "overlaps"),
    "temporary name is a link": ({"--o": "y"}, {"--i": "ids.bin"}, "overlaps"),
    "kept trials": ({"--o": "x"}, {"--i": ".x.trials-0.jsonl"}, "overlaps"),
    "two outputs": ({"--o": "new.json", "--p": "./new.json"}, {}, "--p: 'new.json' overlaps 'new.json', which --o"),
    "sidecar": ({"--o": ["a.bin", "a.bin.json"], "--p": "a.bin.json"}, {}, "--p: 'a.bin.json'"),
    "temporary name of another": ({"--p": ".a.partial", "--o": "a"}, {}, "overlaps"),
    "temporary name of the first": ({"--o": "a", "--p": ".a.partial"}, {}, "overlaps"),
    "new folder": ({"--o": OutputFolder("new/sub", "mark")}, {"--i": "texts"}, None),
    "empty folder": ({"--o": OutputFolder("empty", "mark")}, {}, None),
    "own folder": ({"--o": OutputFolder("own", "mark")}, {}, None),
    "own folder, to be kept": ({"--o": OutputFolder("own", "mark", overwrite=False)}, {}, "not empty; c"),
    "foreign folder": ({"--o": OutputFolder("texts", "mark")}, {}, "no folder of this command (mark"),
    "folder is a file": ({"--o": OutputFolder("ids.bin", "mark")}, {}, "is a file; give the path of a folder"),
    "folder around": ({"--o": OutputFolder("own", "mark")}, {"--i": "own/mark"}, "overlaps"),
    "folder within": ({"--o": OutputFolder("texts/new", "mark")}, {"--i": "texts"}, "overlaps"),
    "nameless folder": ({"--o": OutputFolder(".", "mark")}, {}, "has no name of its own"),
}  # fmt: skip


@pytest.mark.parametrize("name", PLACES)
def test_places(work, name):
    outputs, inputs, words = PLACES[name]
    for file in (".x.partial", ".x.trials-0.jsonl", "old.json"):
        Path(file).write_text("{}")
    for folder in ("empty", "own"):
        Path(folder).mkdir()
    Path("own/mark").touch()
    Path("linked").symlink_to("texts")
    Path(".y.partial").symlink_to("ids.bin")
    Path("to_null").symlink_to("/dev/null")
    before = state(work)
    if words is None:
        check_outputs(outputs, inputs)
    else:
        with pytest.raises(ValueError) as caught:
            check_outputs(outputs, inputs)
        assert words in str(caught.value)
    assert state(work) == before, "a check writes nothing"
