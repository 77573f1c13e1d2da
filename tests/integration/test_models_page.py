"""docs/models.md says what `docs/list_models.py` finds: for a few types here, for all of them in the slow test."""

import runpy

import pytest
from conftest import REPO

from longqlora.files import read_json

MODULE = runpy.run_path(str(REPO / "docs" / "list_models.py"))
RESULTS = read_json(MODULE["RESULTS"])


def check(run_script, tmp_path, types):
    file = tmp_path / "models.json"
    run_script("docs/list_models.py", *types, "--results", file, timeout=60 * len(types), check=True)
    assert read_json(file) == {name: RESULTS[name] for name in types}


def test_the_page_is_that_of_the_results():
    assert MODULE["PAGE"].read_text() == MODULE["models_page"](RESULTS), "run `python docs/list_models.py`"


def test_a_few_types_are_as_the_page_says(run_script, tmp_path):
    """Beside common ones: a norm in a norm, RoPE by kind of layer, integer weights, a row beyond the vocabulary."""
    own = ["axk2", "cohere_compass_text", "deepseek_v4", "gemma4_text", "granitemoehybrid", "moshi"]
    check(run_script, tmp_path, [*own, "gemma3_text", "llama", "phi", "phi3"])


def test_reasons_are_whole():
    reasons = [value for row in RESULTS.values() for value in row.values() if isinstance(value, str)]
    assert not any("Error: " in reason or len(reason) == 300 for reason in reasons)


@pytest.mark.slow
def test_all_types_are_as_the_page_says(run_script, tmp_path):
    check(run_script, tmp_path, sorted(RESULTS))
