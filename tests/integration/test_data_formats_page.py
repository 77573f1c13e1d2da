"""docs/data_formats.md says what `docs/list_data_formats.py` finds, and its forms mix in one run."""

import json
import runpy

import pytest
from conftest import REPO
from training_process import losses_of, train

from longqlora.files import read_json

MODULE = runpy.run_path(str(REPO / "docs" / "list_data_formats.py"))
FORMS, RESULTS = MODULE["FORMS"], read_json(MODULE["RESULTS"])


def test_the_page_is_that_of_the_results():
    assert list(RESULTS) == list(FORMS), "run `python docs/list_data_formats.py`"
    assert MODULE["PAGE"].read_text() == MODULE["formats_page"](RESULTS), "run `python docs/list_data_formats.py`"


@pytest.mark.slow
def test_all_forms_are_as_the_page_says(run_script, tmp_path):
    file = tmp_path / "data_formats.json"
    run_script("docs/list_data_formats.py", "--results", file, timeout=600, check=True)
    for name, found in read_json(file).items():
        expected = RESULTS[name]
        assert found.pop("losses") == pytest.approx(expected["losses"], abs=0.01), name
        assert found == {key: value for key, value in expected.items() if key != "losses"}


def test_forms_are_trained_on_as_they_are_published(write_yaml, tmp_path):
    """All conversations without tools, as a mixture."""
    named = {name: form for name, form in FORMS.items() if form.is_chat and not form.has_tools}
    for form in named.values():
        MODULE["write_file"](form, tmp_path)
    sources = [str(tmp_path / f"*.{suffix}") for suffix in ("json", "jsonl", "parquet")]
    changes = {"train_file": sources, "train_file_weights": [1, 0.5, 2], "max_steps": None, "num_train_epochs": 1}
    lengths = {"model_max_length": 512, "max_seq_length": 512}
    path, out = write_yaml(sft=True, pack=False, save_strategy="no", **changes, **lengths)
    train(path)
    log = (out / "train.log").read_text()
    for name, form in named.items():
        [line] = [line for line in log.splitlines() if f"train_file: {tmp_path / form.file}: 2 rows from 2" in line]
        assert f"form {RESULTS[name]['form']}" in line
    # 3, 6 and 2 files of two rows.
    assert "train_file: 20 rows of 11 sources, 1 + 1 + 1 + 0.5" in log and len(losses_of(out)) == 10
    record = json.loads((out / "run_record.json").read_text())
    assert len(record["arguments"]["data"]["train_file"]) == 11 and len(record["data_sha256"]["train_file"]) == 64
