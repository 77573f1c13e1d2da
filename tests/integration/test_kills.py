"""Runs that are killed, started twice or out of disk go on to the same bits.

The slow tests repeat what the quick ones do once or a few times; NUM_KILLS says how often (40).
"""

import contextlib
import os
import random
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from conftest import ZERO2
from training_process import losses_of, same_weights, start, train, weights_of

from longqlora.training.resume import list_checkpoints

RESUME = ("--resume_from_checkpoint", "true")
NUM_KILLS = int(os.environ.get("NUM_KILLS", "40"))
slow = pytest.mark.slow
# Half of the six steps with S2-Attn, half with full attention: the switch is behind checkpoint 3.
SWITCHES = {"dense_finish": 0.5, "save_steps": 1, "save_total_limit": None}
SWITCH_TEXT = "step 4: full causal attention"
# What to wait for before a kill, in the output_dir or in the log.
MOMENTS = (
    "checkpoint-1", ".saving/checkpoint-2", "checkpoint-2", ".saving/checkpoint-3", "checkpoint-3", SWITCH_TEXT,
    ".saving/checkpoint-4", "checkpoint-4", ".saving/checkpoint-5", "checkpoint-5",
)  # fmt: skip
KINDS = pytest.mark.parametrize(
    "changes,num_attempts",
    [
        pytest.param({"deepspeed": ZERO2}, 3, id="zero2"),
        pytest.param({}, 2, id="plain"),
        pytest.param({"deepspeed": ZERO2}, NUM_KILLS // 2, id="zero2-often", marks=slow),
        pytest.param({}, NUM_KILLS // 2, id="plain-often", marks=slow),
    ],
)


@pytest.fixture
def whole(write_yaml):
    """Train without a stop: returns a check that another run has the same bits, and the seconds it took."""

    def run(changes: dict):
        path, folder = write_yaml("whole", **changes)
        started = time.monotonic()
        train(path)
        seconds = time.monotonic() - started

        def check(out: Path) -> None:
            assert losses_of(out) == losses_of(folder)
            assert same_weights(out / "final", folder / "final")

        return check, seconds

    return run


def check_and_go_on(path: Path, out: Path) -> None:
    """Every checkpoint is whole; train to the end after a stop at any moment, the one behind `final` among them."""
    for checkpoint in list_checkpoints(out):
        weights_of(checkpoint)
    is_begun = list_checkpoints(out) or not (out / "final").exists()
    train(path, *(RESUME if is_begun else ("--overwrite_output_dir", "true")))


@KINDS
@pytest.mark.parametrize("num_runs", [1, 2])
def test_killed_at_any_moment_resumes_to_the_same_bits(write_yaml, whole, num_runs, changes, num_attempts):
    """Also where two runs were started at once, and are again."""
    check, seconds = whole(changes)
    generator = random.Random(10 + num_runs)
    for attempt in range(num_attempts):
        path, out = write_yaml(f"killed{attempt}", **changes)
        logs = [out.with_suffix(f".{number}") for number in range(num_runs)]
        processes = [start("--train_args_file", path, log=log) for log in logs]
        time.sleep(seconds * generator.uniform(0.15, 0.95 if num_runs == 1 else 1.5))
        for process in processes:
            process.kill()
            process.join()
        if num_runs == 1:
            check_and_go_on(path, out)
        else:
            both = [start("--train_args_file", path, *RESUME, log=log) for log in logs]
            for process in both:
                process.join(240)
            text = "".join(log.read_text(errors="replace") for log in logs)
            # Where one ends before the other looks, the other finds nothing left to do.
            assert sorted(process.exitcode for process in both) in ([0, 2], [0, 0]), text[-4000:]
            assert "Traceback" not in text, text[-4000:]
        check(out)
        shutil.rmtree(out)


@slow
@pytest.mark.parametrize("deepspeed", [ZERO2, None], ids=["zero2", "plain"])
def test_killed_around_the_switch_to_dense_steps_resumes_to_the_same_bits(write_yaml, whole, deepspeed):
    """At each of MOMENTS, or up to 30 ms behind it; `-s` prints where each kill hit."""
    changes, generator = {**SWITCHES, "deepspeed": deepspeed}, random.Random(14)
    check, _ = whole(changes)
    for attempt in range(max(len(MOMENTS), NUM_KILLS // 2)):
        path, out = write_yaml(f"switch{attempt}", **changes)
        moment, log = MOMENTS[attempt % len(MOMENTS)], out.with_suffix(".killed")
        process, end = start("--train_args_file", path, log=log), time.monotonic() + 60
        while not (out / moment).exists() and moment not in (log.read_text() if log.exists() else ""):
            assert process.is_alive() and time.monotonic() < end, log.read_text()[-4000:]
            time.sleep(0.001)
        time.sleep(generator.choice((0, generator.uniform(0, 0.03))))
        process.kill()
        process.join()
        last = max((int(path.name.removeprefix("checkpoint-")) for path in list_checkpoints(out)), default=0)
        print(f"{moment}: checkpoint {last}, {'behind' if SWITCH_TEXT in log.read_text() else 'before'} the switch")
        check_and_go_on(path, out)
        check(out)
        shutil.rmtree(out)


@contextlib.contextmanager
def small_disk(folder: Path, num_bytes: int):
    """A file system of its own on `folder`; returns what makes it large."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        yield lambda: subprocess.run(["mount", "-o", "remount,size=1g", str(folder)], check=True)
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@slow
@pytest.mark.parametrize("deepspeed", [ZERO2, None], ids=["zero2", "plain"])
def test_a_disk_that_fills_at_any_moment_loses_nothing(write_yaml, whole, deepspeed):
    check, _ = whole({"deepspeed": deepspeed})
    used = sum(path.stat().st_size for path in write_yaml("whole")[1].rglob("*") if path.is_file())
    generator = random.Random(13)
    for attempt in range(NUM_KILLS // 4):
        path, out = write_yaml(f"full{attempt}", deepspeed=deepspeed)
        log = out.with_suffix(".out")
        with small_disk(out, int(used * generator.uniform(0.05, 1.0))) as enlarge:
            process = start("--train_args_file", path, log=log)
            process.join(240)
            text = log.read_text(errors="replace")
            errors = [line for line in text.splitlines() if line.startswith("error:")]
            assert (process.exitcode, len(errors)) in ((0, 0), (2, 1)) and "Traceback" not in text, text[-4000:]
            assert not (out / ".saving").exists() and not list(out.glob(".*.partial"))
            enlarge()
            check_and_go_on(path, out)
            check(out)
