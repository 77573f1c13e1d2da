"""Runner of independent trials: order, resuming after a kill, several processes."""

import json
import os
from pathlib import Path

import pytest
import torch
from script_process import start_world

from longqlora.evaluation.trials import finish_trials, run_trials

TRIALS = [{"length": number % 3, "number": number, "text": "naïve\u2028 ünïcode"} for number in range(7)]
# A run as a process of its own: counts its calls in a file, and can die in the middle of one.
PROGRAM = """
import json, os, sys
from pathlib import Path
from longqlora.distributed import init_process_group, rank
from longqlora.evaluation.trials import finish_trials, run_trials
output_file, die_at = Path(sys.argv[1]), int(sys.argv[2])
trials = [dict(number=number) for number in range(7)]

def run_one(trial):
    if trial["number"] == die_at:
        os._exit(9)
    with open(f"{output_file}.calls-{rank()}", "a") as file:
        file.write(str(trial["number"]) + " ")
    return {"square": trial["number"] ** 2, "third": trial["number"] / 3}

init_process_group()
# A fingerprint may differ between processes, as those of some data sets do.
results = run_trials(trials, run_one, output_file=output_file, fingerprint={"data": rank()}, desc="test")
Path(f"{output_file}.rank-{rank()}").write_text(json.dumps(results))
finish_trials(output_file)
"""
EXPECTED = [{"square": number**2, "third": number / 3} for number in range(7)]


class Counter:
    """A `run_one` that remembers what it was asked and fails at one trial."""

    def __init__(self, fail_at=None, error=KeyboardInterrupt):
        self.seen, self.fail_at, self.error = [], fail_at, error

    def __call__(self, trial):
        if trial["number"] == self.fail_at:
            raise self.error("stopped")
        self.seen.append(trial["number"])
        return {"number": trial["number"], "third": trial["number"] / 3, "text": trial.get("text")}


def run(run_one, output_file=None, trials=TRIALS, **fingerprint):
    return run_trials(trials, run_one, output_file=output_file, fingerprint=fingerprint, desc="test")


def kept(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.name.startswith("."))


@pytest.fixture
def stopped(tmp_path) -> Path:
    """Output file of a run that stopped before its fifth trial."""
    with pytest.raises(KeyboardInterrupt):
        run(Counter(fail_at=4), tmp_path / "out.json", model="m")
    return tmp_path / "out.json"


def test_results_come_in_trial_order_and_nothing_is_left_behind(tmp_path):
    counter, output_file = Counter(), tmp_path / "new folder" / "out.json"
    results = run(counter, output_file)
    assert [result["number"] for result in results] == counter.seen == list(range(7))
    assert results[1] == {"number": 1, "third": 1 / 3, "text": TRIALS[1]["text"]}
    finish_trials(output_file)
    assert kept(output_file.parent) == []
    assert run(Counter()) == results and run(Counter(), output_file, trials=[]) == []
    values = {"pair": (1, 2), 3: float("inf"), "third": 1 / 3, "tiny": 1e-300}
    as_json = [{"pair": [1, 2], "3": float("inf"), "third": 1 / 3, "tiny": 1e-300}] * 7
    assert run(lambda trial: values) == run(lambda trial: values, output_file) == as_json, "with and without a file"


def test_what_another_model_did_is_not_taken(stopped, capsys):
    kept(stopped.parent)[0].rename(stopped.parent / ".out.json.trials-3.jsonl")
    (stopped.parent / ".out.json.trials-4.jsonl").write_text('{"fingerprint": "of an older version"}\n{"trial": "x"}\n')
    counter = Counter()
    run(counter, stopped, model="other")
    assert counter.seen == list(range(7))
    assert "partial results of other arguments found" in capsys.readouterr().out
    back = Counter()
    run(back, stopped, model="m")
    assert back.seen == [4, 5, 6], "both runs are kept"
    finish_trials(stopped)
    assert kept(stopped.parent) == []


def test_added_removed_and_equal_trials(stopped):
    counter = Counter()
    results = run(counter, stopped, trials=[{"number": 9}, *TRIALS[2:4]], model="m")
    assert counter.seen == [9] and [result["number"] for result in results] == [9, 2, 3]
    counter = Counter()
    results = run(counter, trials=[TRIALS[2], TRIALS[1], TRIALS[2]])
    assert counter.seen == [2, 1] and [result["number"] for result in results] == [2, 1, 2]


def test_names_with_wildcards_do_not_touch_other_files(tmp_path):
    run(Counter(), tmp_path / "outa.json")
    run(Counter(), tmp_path / "out[a].json")
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
        run(Counter(fail_at=2, error=error))
    assert caught.value.from_one_rank


def launch(output_file: Path, *, num_processes: int, die_at: int = -1):
    program = output_file.with_suffix(".py")
    program.write_text(PROGRAM)
    processes = start_world([program, output_file, die_at], [os.devnull] * 3, num_processes=num_processes)
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


def test_two_processes_share_what_a_killed_one_left(tmp_path):
    output_file = tmp_path / "out.json"
    assert launch(output_file, num_processes=1, die_at=2) == [9] and len(kept(tmp_path)) == 1
    # What rank 1 left counts as well; ranks take the open trials 2 .. 6 in turn.
    (tmp_path / ".out.json.trials-1.jsonl").write_bytes(kept(tmp_path)[0].read_bytes())
    kept(tmp_path)[0].unlink()
    assert launch(output_file, num_processes=2) == [0, 0]
    for rank in range(2):
        assert json.loads(Path(f"{output_file}.rank-{rank}").read_text()) == EXPECTED
    assert Path(f"{output_file}.calls-0").read_text() == "0 1 2 4 6 "
    assert Path(f"{output_file}.calls-1").read_text() == "3 5 "
    assert kept(tmp_path) == []
