"""The model card of final/, and its way to the hub; the hub's library is replaced."""

import json
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from huggingface_hub import ModelCard
from training_process import fail, train

from longqlora.settings.reader import resolve_settings
from longqlora.training.arguments import build_arguments
from longqlora.training.hub import NEVER_UPLOADED, create_repository, upload
from longqlora.training.run import Run

TRAINING = {"push_to_hub": True, "output_dir": "output/my-run", "hub_token": "hf_secret"}


@pytest.fixture
def hub(monkeypatch):
    """HfApi in the place of the real one."""
    hub = Mock()
    hub.create_repo.side_effect = lambda name, **options: SimpleNamespace(repo_id=f"me/{name}")
    monkeypatch.setattr("huggingface_hub.HfApi", Mock(return_value=hub))
    return hub


@pytest.mark.parametrize(
    ("changes", "name"), [({}, "me/my-run"), ({"hub_model_id": "x"}, "me/x"), ({"push_to_hub": False}, None)]
)
def test_repository_is_created_before_training(hub, changes, name):
    assert create_repository({**TRAINING, **changes, "hub_private_repo": True}) == name
    assert hub.create_repo.call_count == bool(name)
    assert not name or hub.create_repo.call_args.kwargs == {"private": True, "exist_ok": True}
    hub.create_branch.assert_not_called()


def test_transformers_pushes_nothing_by_itself(write_yaml):
    settings, _ = resolve_settings(str(write_yaml(push_to_hub=True, hub_token="hf_secret")[0]), [])
    assert settings.training["push_to_hub"] and not build_arguments(settings).push_to_hub


def test_final_alone_is_uploaded_without_pickles(hub, tmp_path):
    upload(tmp_path / "final", "me/x", {**TRAINING, "hub_revision": "v1"})
    (given,) = [call.kwargs for call in hub.upload_folder.call_args_list]
    assert given["folder_path"] == tmp_path / "final" and given["repo_id"] == "me/x" and given["revision"] == "v1"
    assert given["ignore_patterns"] == NEVER_UPLOADED and "*.bin" in NEVER_UPLOADED and "*.pt" in NEVER_UPLOADED


@pytest.mark.parametrize("repository", ["me/x", None])
def test_a_run_uploads_its_final_when_it_is_over(hub, tmp_path, repository):
    settings, record = SimpleNamespace(training=TRAINING), {"first_dense_step": None}
    run = Run(None, record, SimpleNamespace(path=tmp_path), None, 0.0, settings, repository)
    state = SimpleNamespace(global_step=1, log_history=[])
    run.finish(Mock(state=state, start_up_seconds=1.0, data_seconds=0.0), predicted_gib=1.0)
    uploaded = [call.kwargs["folder_path"] for call in hub.upload_folder.call_args_list]
    assert uploaded == ([tmp_path / "final"] if repository else [])


def test_a_hub_that_refuses_is_one_line(hub, tmp_path):
    hub.create_repo.side_effect = hub.upload_folder.side_effect = RuntimeError("401\nno token")
    with pytest.raises(ValueError, match="push_to_hub: cannot write to 'my-run' .401 no token.*hf auth login"):
        create_repository(TRAINING)
    with pytest.raises(ValueError, match="push_to_hub: could not upload .*which is complete.*hf upload me/x"):
        upload(tmp_path, "me/x", TRAINING)


def test_a_run_pushes_nothing_of_its_own_and_stops_before_training_where_there_is_no_hub(write_yaml):
    path, out = write_yaml(push_to_hub=True, hub_model_id="me/x")
    assert "push_to_hub: cannot write to 'me/x'" in fail(path)
    assert not list(out.glob("checkpoint-*")) and not (out / "final").exists()
    assert "hub_strategy: 'every_save' is not end" in fail(write_yaml(push_to_hub=True, hub_strategy="every_save")[0])


@pytest.mark.parametrize("finetuning_type", ["qlora", "full"])
def test_final_has_a_model_card(write_yaml, train_file, finetuning_type):
    unused = dict.fromkeys(("lora_rank", "train_embedding", "train_norm")) if finetuning_type == "full" else {}
    path, out = write_yaml(finetuning_type=finetuning_type, max_steps=2, eval_file=str(train_file), eval_steps=2,
                           eval_strategy="steps", attention="full", **unused)  # fmt: skip
    train(path)
    card, log = ModelCard.load(out / "final" / "README.md"), json.loads((out / "train_results.json").read_text())
    loss = next(entry["eval_loss"] for entry in log["log_history"] if "eval_loss" in entry)
    assert card.data.library_name == ("transformers" if finetuning_type == "full" else "peft")
    assert card.data.base_model is None and card.data.eval_results[0].dataset_name == train_file.name
    for text in ("| context | 128 tokens |", "| RoPE | linear x2 |", f"{loss:.4f}, perplexity", "max_seq_length: 128",
                 "How to load", "torch ", "lora" if finetuning_type == "qlora" else "all weights"):  # fmt: skip
        assert text in card.text, text
    # Folders of the machine stay there, and nothing pickled is in the folder.
    assert str(out.parent) not in card.text and not [*(out / "final").glob("*.bin"), *(out / "final").glob("*.pt")]
    assert not list((out / "checkpoint-2").glob("README.md"))
