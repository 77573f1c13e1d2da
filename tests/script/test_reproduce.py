"""The runner of the suites: a smoke cell of each, what a kill and a failed cell leave, keys, intervals, the YAMLs."""

import json
import math
import time
from dataclasses import replace

import psutil
import pytest
import script_process
from reproduce import SUITES
from reproduction.report import Figures, mean_interval, with_interval
from reproduction.suite import SCALES, Scale, Suite

from longqlora.files import write_json
from longqlora.settings.reader import read_yaml

SCRIPT = "benchmark/reproduce.py"


def read(name: str, scale: str, folder) -> tuple[Suite, Scale]:
    found = Scale.read(scale, folder, {"books": "/books"})
    return Suite.read(name, found.values), found


@pytest.fixture(scope="module")
def smoke(tmp_path_factory, run_script):
    """A run of all suites that was first killed while its first cell trained; the folder, and what became of the kill.

    The processes that the kill left, and the cells that it left.
    """
    folder = tmp_path_factory.mktemp("smoke")
    words = ["--suite", "all", "--smoke", "--output_dir", folder / "out", "--report_dir", folder / "pages"]
    streams = [folder / name for name in ("stdin", "stdout", "stderr")]
    first = [script_process.REPO / SCRIPT, *words[:2], *words[2:]]
    process = script_process.start_script(first, streams, script_process.QUIET, daemon=False)
    deadline = time.monotonic() + 120
    while not list(folder.glob("out/trainings/*/train.log")):
        assert process.is_alive() and time.monotonic() < deadline, streams[2].read_text()
        time.sleep(0.05)
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.join()
    _, alive = psutil.wait_procs(children, timeout=10)
    left = list(folder.glob("out/cells/*"))
    done = run_script(SCRIPT, *words, check=True)
    return folder, len(children), alive, left, done


def test_a_killed_run_leaves_no_process_and_no_cell_and_goes_on(smoke):
    folder, num_children, alive, left, _ = smoke
    assert num_children == 2 and not alive and not left
    assert len(list(folder.glob("out/cells/*.json"))) == 5 and not list(folder.glob("out/trainings/*"))


@pytest.mark.parametrize("name", SUITES)
def test_the_smoke_cell_of_a_suite(smoke, name):
    pages = smoke[0] / "pages"
    suite, _ = read(name, "smoke", pages)
    page, record = (pages / f"{name}-smoke.md").read_text(), json.loads((pages / f"{name}-smoke.json").read_text())
    cell = {**record["of_all"], **record["cells"]["python"][suite.smoke][0]}
    assert all(math.isfinite(result["perplexity"]) for result in cell["perplexity"]) and cell["passkey"]["cells"]
    training = cell["training"]
    assert training["flops"] > 0 and training["num_parameters"] > 0 and len(training["losses"]) == 2
    assert f"{cell['perplexity'][-1]['perplexity']:.2f}" in page and suite.smoke in page
    for plot in suite.plots:
        assert (pages / f"{name}-smoke-python-{plot}.png").stat().st_size > 1000
        assert f"{name}-smoke-python-{plot}.png" in page


def test_finished_cells_are_skipped_and_a_page_is_made_from_them(smoke, run_script):
    folder = smoke[0]
    page, cells = folder / "pages" / "recipe-smoke.md", sorted(folder.glob("out/cells/*.json"))
    before, text = [path.stat().st_mtime_ns for path in cells], page.read_text()
    page.unlink()
    words = ["--suite", "recipe", "--smoke", "--output_dir", folder / "out", "--report_dir", folder / "pages"]
    run_script(SCRIPT, *words, check=True)
    assert page.read_text() == text
    assert [path.stat().st_mtime_ns for path in sorted(folder.glob("out/cells/*.json"))] == before


def test_failed_cells_are_named_with_their_log_and_the_rest_goes_on(tmp_path, run_script):
    out = tmp_path / "out"
    (out / "logs").mkdir(parents=True)
    # Where the trainings would keep their tokens.
    (out / "cache").write_text("")
    words = ["--suite", "recipe", "adapters", "--smoke", "--output_dir", out, "--report_dir", tmp_path / "pages"]
    done = run_script(SCRIPT, *words)
    assert done.returncode == 2 and "2 cells failed" in done.stderr.splitlines()[-1]
    for name in ("recipe: YaRN, S2 + 10% dense (python, seed 0)", "adapters: LoRA r 8, norm and embedding"):
        assert f"FAILED {name}" in done.stderr and done.stderr.count("cannot be a folder, since") == 2
    assert not list(out.glob("cells/*")) and "0 of 1 measured" in (tmp_path / "pages" / "recipe-smoke.md").read_text()


def test_a_key_changes_with_all_that_decides_a_number(tmp_path):
    suite, scale = read("recipe", "tiny", tmp_path)
    cells = suite.cells(scale)
    assert len({cell.key for cell in cells}) == len(cells)
    key = cells[0].key
    others = {
        "train": {**scale.train, "lora_rank": 17},
        "perplexity": {**scale.perplexity, "max_windows": 31},
        "passkey": {**scale.passkey, "num_trials": 9},
        "reading": {"dtype": "bf16"},
        "datasets": [replace(scale.datasets[0], base="another/base"), *scale.datasets[1:]],
    }
    for name, value in others.items():
        assert suite.cells(replace(scale, **{name: value}))[0].key != key, name
    assert suite.cells(replace(scale, train={**scale.train, "logging_steps": 7}))[0].key == key


def test_suites_share_cells(tmp_path):
    keys = {}
    for name in SUITES:
        suite, scale = read(name, "tiny", tmp_path)
        keys[name] = {cell.key for cell in suite.cells(scale)}
    assert keys["short_context"] < keys["recipe"]
    for other in ("headline", "methods", "patterns", "quantisation", "steps"):
        assert keys[other] & keys["recipe"], other


@pytest.mark.parametrize("name", SUITES)
def test_a_suite_names_rows_that_it_has(name, tmp_path):
    for scale in read_yaml(SCALES):
        suite, found = read(name, scale, tmp_path)
        rows = {row.name for row in suite.rows}
        named = {suite.smoke, *suite.passkey_rows, *filter(None, (suite.recommended, suite.reference))}
        assert (suite.reference is not None) == ("excess" in suite.columns)
        assert named <= rows and len(rows) == len(suite.rows)
        for source in suite.paper:
            assert source["rows"].keys() <= rows, source["source"]
            assert {len(values) for values in source["rows"].values()} == {len(source["columns"])}
        assert all(len(cell.commands()) >= 2 for cell in suite.cells(found))


def test_a_dry_run_lists_commands_and_writes_nothing(tmp_path, run_in_process):
    code, printed, _ = run_in_process(
        SCRIPT, "--suite", "recipe", "--scale", "paper", "--dry_run", "--output_dir", tmp_path / "out"
    )
    assert code == 0 and not (tmp_path / "out").exists()
    assert (
        "--rope_type yarn --learning_rate 5e-05 --attention s2 --dense_finish 0.1 --max_steps 1000 --seed 42" in printed
    )
    assert (
        "meta-llama/Llama-2-7b-hf" in printed and "benchmark/train_pattern.py --pattern every_fourth_dense" in printed
    )


def test_the_interval_is_students(tmp_path):
    mean, half = mean_interval([1.0, 2.0, 3.0])
    assert mean == 2 and half == pytest.approx(4.303 / math.sqrt(3))
    assert mean_interval([5.0]) == (5.0, 0)
    assert with_interval([1.0, 2.0, 3.0], ".2f") == "2.00 ± 2.48"
    assert with_interval([2.0, 2.0], ".1f") == "2.0" and with_interval([], ".1f") == "-"
    assert with_interval([1.0, 2.0, 3.0], "+.1f") == "+2.0 ± 2.5"


def test_the_excess_is_over_the_reference_with_the_same_seed(tmp_path):
    suite, scale = read("recipe", "smoke", tmp_path)
    perplexities = {"YaRN, full": {0: 8.0, 1: 10.0}, "YaRN, S2": {0: 8.8, 1: 10.5, 2: 9.0}, "base": {None: 30.0}}
    cells = [cell for cell in suite.cells(replace(scale, seeds=[0, 1, 2])) if cell.row in perplexities]
    for cell in cells:
        if (value := perplexities[cell.row].get(cell.seed)) is not None:
            result = {"seq_len": 512, "perplexity": value}
            write_json(cell.path, {"seed": cell.seed, "perplexity": [{**result, "seq_len": 128}, result]})
    figures = Figures(suite, scale, cells)
    assert figures.excess("YaRN, S2") == pytest.approx([10.0, 5.0]) and figures.excess("base") == []
