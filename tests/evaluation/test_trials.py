"""Runner of independent trials: order, resuming after a kill, several processes."""

import json
import os
from pathlib import Path

import pytest
import torch
from script_process import start_world

from longqlora.evaluation.trials import finish_trials, run_trials

TRIALS = [{"length": number % 3, "number": number, "text": "naïve\u2028 ünïcode"} for number in range(7)]
# A run as a process of its own, which can die in the middle.
PROGRAM = """
import json, os, sys
from pathlib import Path
from longqlora.distributed import init_process_group, rank
from longqlora.evaluation.trials import finish_trials, run_trials

def run_one(trial):
    if trial["number"] == int(sys.argv[2]):
        os._exit(9)
    return {"third": trial["number"] / 3, "rank": rank()}

init_process_group()
output_file, trials = Path(sys.argv[1]), [{"number": number} for number in range(7)]
# A fingerprint may differ between processes, as those of some data sets do.
results = run_trials(trials, run_one, output_file=output_file, fingerprint={"data": rank()}, desc="test")
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


def test_results_are_as_json_gives_them_back(tmp_path):
    values = {"pair": (1, 2), 3: float("inf"), "third": 1 / 3, "tiny": 1e-300}
    for output_file in (None, tmp_path / "out.json"):
        found = run_trials(TRIALS, lambda trial: values, output_file=output_file, fingerprint={}, desc="")
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


def test_two_processes_share_what_a_killed_one_left(tmp_path):
    output_file, program = tmp_path / "out.json", tmp_path / "program.py"
    program.write_text(PROGRAM)

    def exit_codes(num_processes: int, die_at: int) -> list[int]:
        words, streams = [program, output_file, die_at], [os.devnull] * 3
        processes = start_world(words, streams, num_processes=num_processes)
        for process in processes:
            process.join(60)
        return [process.exitcode for process in processes]

    assert exit_codes(num_processes=1, die_at=2) == [9] and len(kept(tmp_path)) == 1
    # What another rank left counts as well.
    kept(tmp_path)[0].rename(tmp_path / ".out.json.trials-1.jsonl")
    assert exit_codes(num_processes=2, die_at=-1) == [0, 0]
    # The open trials 2 .. 6 are dealt out in turn, and both know all results.
    expected = [{"third": number / 3, "rank": rank} for number, rank in enumerate([0, 0, 0, 1, 0, 1, 0])]
    for rank in range(2):
        assert json.loads(Path(f"{output_file}.rank-{rank}").read_text()) == expected
    assert kept(tmp_path) == []
