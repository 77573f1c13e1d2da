"""Runner of independent trials: order, resuming after a kill, several processes."""

import json
import os
from pathlib import Path

import pytest
import torch
from script_process import start_world

from longqlora.evaluation.trials import finish_trials, run_trials

TRIALS = [{"length": number % 3, "number": number, "text": "naïve\u2028 ünïcode"} for number in range(7)]
# A run in processes of their own. A fingerprint may differ between them, as those of some data sets do.
PROGRAM = """
import json, sys
from pathlib import Path
from test_trials import TRIALS
from longqlora.distributed import init_process_group, rank
from longqlora.evaluation.trials import finish_trials, run_trials

init_process_group()
output_file, options = Path(sys.argv[1]), {"fingerprint": {"model": "mx"[rank()]}, "desc": "test"}
results = run_trials(TRIALS, lambda trial: {"rank": rank()}, output_file=output_file, **options)
Path(f"{output_file}.rank-{rank()}").write_text(json.dumps(results))
finish_trials(output_file)
"""


def run(output_file=None, trials=TRIALS, *, fail_at=None, error=KeyboardInterrupt, **fingerprint):
    """The results of the trials, and the numbers of those that were run; `fail_at` raises `error`."""
    numbers = []

    def run_one(trial):
        if trial["number"] == fail_at:
            raise error("stopped")
        numbers.append(trial["number"])
        return {"number": trial["number"], "third": trial["number"] / 3, "text": trial.get("text")}

    return run_trials(trials, run_one, output_file=output_file, fingerprint=fingerprint, desc="test"), numbers


def kept(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.name.startswith("."))


@pytest.fixture
def stopped(tmp_path) -> Path:
    """Output file of a run that stopped before its fifth trial."""
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out.json", fail_at=4, model="m")
    return tmp_path / "out.json"


def test_results_come_in_trial_order_and_nothing_is_left_behind(tmp_path):
    output_file = tmp_path / "new folder" / "out.json"
    results, numbers = run(output_file)
    assert [result["number"] for result in results] == numbers == list(range(7))
    assert results[1] == {"number": 1, "third": 1 / 3, "text": TRIALS[1]["text"]}
    finish_trials(output_file)
    assert kept(output_file.parent) == []
    assert run() == (results, numbers) and run(output_file, trials=[]) == ([], [])


@pytest.mark.parametrize("name", [None, "out.json"])
def test_results_are_as_json_gives_them_back(name, tmp_path):
    values = {"pair": (1, 2), 3: float("inf"), "third": 1 / 3, "tiny": 1e-300}
    found = run_trials(TRIALS, lambda trial: values, output_file=name and tmp_path / name, fingerprint={}, desc="")
    assert found == [{"pair": [1, 2], "3": float("inf"), "third": 1 / 3, "tiny": 1e-300}] * 7


def test_what_another_model_did_is_not_taken(stopped, capsys):
    kept(stopped.parent)[0].rename(stopped.parent / ".out.json.trials-3.jsonl")
    (stopped.parent / ".out.json.trials-4.jsonl").write_text('{"fingerprint": "of an older version"}\n{"trial": "x"}\n')
    assert run(stopped, model="other")[1] == list(range(7))
    assert "partial results of other arguments found" in capsys.readouterr().out
    assert run(stopped, model="m")[1] == [4, 5, 6], "both runs are kept"
    finish_trials(stopped)
    assert kept(stopped.parent) == []


def test_added_removed_and_equal_trials(stopped):
    results, numbers = run(stopped, [{"number": 9}, *TRIALS[2:4]], model="m")
    assert numbers == [9] and [result["number"] for result in results] == [9, 2, 3]
    results, numbers = run(trials=[TRIALS[2], TRIALS[1], TRIALS[2]])
    assert numbers == [2, 1] and [result["number"] for result in results] == [2, 1, 2]


def test_names_with_wildcards_do_not_touch_other_files(tmp_path):
    run(tmp_path / "outa.json")
    run(tmp_path / "out[a].json")
    finish_trials(tmp_path / "out[a].json")
    assert [path.name for path in kept(tmp_path)] == [".outa.json.trials-0.jsonl"]


@pytest.mark.parametrize(
    ("error", "message"),
    [(ValueError, "stopped"), (OSError, "stopped"),
     (torch.OutOfMemoryError, "out of GPU memory at length 2, number 2; lower")],
)  # fmt: skip
def test_an_error_of_a_trial_is_marked_for_printing(error, message):
    expected = ValueError if error is torch.OutOfMemoryError else error
    with pytest.raises(expected, match=message) as caught:
        run(fail_at=2, error=error)
    assert caught.value.from_one_rank


def test_two_processes_share_what_another_left(stopped):
    program = stopped.with_name("program.py")
    program.write_text(PROGRAM)
    # What another rank left counts as well.
    kept(stopped.parent)[0].rename(stopped.parent / ".out.json.trials-1.jsonl")
    processes = start_world([program, stopped], [os.devnull] * 3, num_processes=2)
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    for rank in range(2):
        results = json.loads(Path(f"{stopped}.rank-{rank}").read_text())
        # The open trials 4 .. 6 are dealt out in turn, and both know all results.
        assert [result.get("rank") for result in results] == [None] * 4 + [0, 1, 0]
    assert kept(stopped.parent) == []
