"""Runner of independent trials: order, resuming after a kill, several processes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from longqlora.evaluation.trials import finish_trials, run_trials

REPO = Path(__file__).resolve().parents[2]
TRIALS = [{"length": number % 3, "number": number, "text": "naïve\u2028 ünïcode"} for number in range(7)]
# A run as a process of its own: counts its calls in a file, and can die in the middle of one.
PROGRAM = """
import json, os, sys
sys.path.insert(0, {repo!r})
from pathlib import Path
from longqlora.distributed import init_process_group, rank
from longqlora.evaluation.trials import finish_trials, run_trials
output_file, die_at = Path(sys.argv[1]), int(sys.argv[2])
trials = [dict(number=number) for number in range(7)]

def run_one(trial):
    if trial["number"] == die_at:
        os._exit(9)
    with open(f"{{output_file}}.calls-{{rank()}}", "a") as file:
        file.write(str(trial["number"]) + " ")
    return {{"square": trial["number"] ** 2, "third": trial["number"] / 3}}

init_process_group()
results = run_trials(trials, run_one, output_file=output_file, fingerprint={{"model": "m"}}, desc="test")
Path(f"{{output_file}}.rank-{{rank()}}").write_text(json.dumps(results))
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
    counter = Counter()
    results = run(counter, tmp_path / "new folder" / "out.json")
    assert [result["number"] for result in results] == counter.seen == list(range(7))
    assert results[1] == {"number": 1, "third": 1 / 3, "text": TRIALS[1]["text"]}
    finish_trials(tmp_path / "new folder" / "out.json")
    assert kept(tmp_path / "new folder") == []
    assert run(Counter()) == results


def test_an_interrupted_run_goes_on_without_doing_a_trial_twice(stopped, capsys):
    counter = Counter()
    results = run(counter, stopped, model="m")
    assert counter.seen == [4, 5, 6]
    assert results == run(Counter())
    assert "resuming: 4 of 7 trials already done" in capsys.readouterr().out
    again = Counter()
    assert run(again, stopped, model="m") == results and again.seen == []


def test_a_torn_last_line_is_passed_over(stopped):
    path = kept(stopped.parent)[0]
    path.write_bytes(path.read_bytes()[:-20])
    counter = Counter()
    assert run(counter, stopped, model="m") == run(Counter())
    assert counter.seen == [3, 4, 5, 6]


def test_what_another_model_did_is_dropped(stopped, capsys):
    kept(stopped.parent)[0].rename(stopped.parent / ".out.json.trials-3.jsonl")
    counter = Counter()
    run(counter, stopped, model="other")
    assert counter.seen == list(range(7))
    assert "partial results of other arguments found" in capsys.readouterr().out
    assert [path.name for path in kept(stopped.parent)] == [".out.json.trials-0.jsonl"]
    back = Counter()
    run(back, stopped, model="m")
    assert back.seen == list(range(7))


def test_added_and_removed_trials_keep_the_others(stopped):
    counter = Counter()
    results = run(counter, stopped, trials=[{"number": 9}, *TRIALS[2:4]], model="m")
    assert counter.seen == [9] and [result["number"] for result in results] == [9, 2, 3]


def test_equal_trials_share_a_result():
    counter = Counter()
    results = run(counter, trials=[TRIALS[2], TRIALS[1], TRIALS[2]])
    assert counter.seen == [2, 1] and [result["number"] for result in results] == [2, 1, 2]


def test_results_are_the_same_with_and_without_a_file(tmp_path):
    def run_one(trial):
        return {"pair": (1, 2), 3: float("inf")}

    assert run(run_one) == run(run_one, tmp_path / "out.json") == [{"pair": [1, 2], "3": float("inf")}] * 7


def test_names_with_wildcards_do_not_touch_other_files(tmp_path):
    run(Counter(), tmp_path / "outa.json")
    run(Counter(), tmp_path / "out[a].json")
    finish_trials(tmp_path / "out[a].json")
    assert [path.name for path in kept(tmp_path)] == [".outa.json.trials-0.jsonl"]


@pytest.mark.parametrize("error", [ValueError, OSError])
def test_an_error_of_a_trial_is_marked_for_printing(error):
    with pytest.raises(error, match="stopped") as caught:
        run(Counter(fail_at=2, error=error))
    assert caught.value.from_one_rank


def test_out_of_memory_names_the_trial():
    import torch

    with pytest.raises(ValueError, match="out of GPU memory at length 2, number 2; shorten") as caught:
        run(Counter(fail_at=2, error=torch.OutOfMemoryError))
    assert caught.value.from_one_rank


def test_no_trials_at_all(tmp_path):
    assert run(Counter(), tmp_path / "out.json", trials=[]) == []


def launch(output_file: Path, *, num_processes: int, die_at: int = -1):
    program = output_file.with_suffix(".py")
    program.write_text(PROGRAM.format(repo=str(REPO)))
    command = [sys.executable, str(program), str(output_file), str(die_at)]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    # Environment as a launcher sets it; starting the launcher itself takes longer than the whole test.
    world = {"WORLD_SIZE": str(num_processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(command, env={**os.environ, **world, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(num_processes)
    ]
    try:
        return [(process.wait(timeout=60), process.stderr.read()) for process in processes]
    finally:
        for process in processes:
            process.kill()


def test_two_processes_share_the_work_after_a_kill_of_one(tmp_path):
    output_file = tmp_path / "out.json"
    assert launch(output_file, num_processes=1, die_at=2)[0][0] == 9
    assert len(kept(tmp_path)) == 1
    outcomes = launch(output_file, num_processes=2)
    assert [code for code, _ in outcomes] == [0, 0], outcomes
    for rank in range(2):
        assert json.loads(Path(f"{output_file}.rank-{rank}").read_text()) == EXPECTED
    # Ranks take the open trials 2 .. 6 in turn; 0 and 1 were done by the first process.
    assert Path(f"{output_file}.calls-0").read_text() == "0 1 2 4 6 "
    assert Path(f"{output_file}.calls-1").read_text() == "3 5 "
    assert kept(tmp_path) == []


def test_one_process_goes_on_where_two_were_killed(tmp_path):
    output_file = tmp_path / "out.json"
    first = {"number": 0}, {"square": 0, "third": 0.0}
    for rank, (trial, result) in enumerate([first, ({"number": 1}, {"square": 1, "third": 1 / 3})]):
        run_trials(
            [trial], lambda _, result=result: result, output_file=output_file, fingerprint={"model": "m"}, desc=""
        )
        kept(tmp_path)[0].rename(tmp_path / f"keep-{rank}")
    for rank in range(2):
        (tmp_path / f"keep-{rank}").rename(tmp_path / f".out.json.trials-{rank}.jsonl")
    assert launch(output_file, num_processes=1)[0][0] == 0
    assert json.loads(Path(f"{output_file}.rank-0").read_text()) == EXPECTED
    assert Path(f"{output_file}.calls-0").read_text() == "2 3 4 5 6 "
