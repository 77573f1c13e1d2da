"""`push_to_hub`: final/, and nothing else, goes to the Hugging Face hub when a run is over.

transformers' own push stays off: it uploads the folder in which checkpoints are staged, with pickled arguments.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub

from longqlora.cli import one_line

# Pickles: optimizer states, training_args.bin.
NEVER_UPLOADED = ["*.bin", "*.pt", "*.pth", "*.pkl"]


def create_repository(training: Mapping[str, Any]) -> str | None:
    """Name of the repository that the settings `training` push to, created where it is not there; None without a push.

    To be called before training: raises ValueError where the hub refuses.
    """
    if not training.get("push_to_hub"):
        return None
    name = training.get("hub_model_id") or Path(training["output_dir"]).resolve().name
    try:
        hub, private = hub_of(training), training.get("hub_private_repo")
        name = hub.create_repo(name, private=private, exist_ok=True).repo_id
        if revision := training.get("hub_revision"):
            hub.create_branch(name, branch=revision, exist_ok=True)
    except Exception as error:
        # The hub's library raises types of its own and those of its HTTP client.
        raise ValueError(
            f"push_to_hub: cannot write to {name!r} ({one_line(error)}); log in with `hf auth login`, correct "
            "hub_model_id, or set push_to_hub: false"
        ) from None
    return name


def upload(folder: Path, name: str, training: Mapping[str, Any]) -> str:
    """Upload `folder` to the repository `name`; returns the address. Raises ValueError saying how to do it later."""
    options = {"commit_message": f"Upload {folder.name}", "revision": training.get("hub_revision")}
    try:
        hub = hub_of(training)
        return str(hub.upload_folder(repo_id=name, folder_path=folder, ignore_patterns=NEVER_UPLOADED, **options))
    except Exception as error:
        raise ValueError(
            f"push_to_hub: could not upload {str(folder)!r}, which is complete ({one_line(error)}); later: "
            f"hf upload {name} {folder}"
        ) from None


def hub_of(training: Mapping[str, Any]) -> "huggingface_hub.HfApi":
    return huggingface_hub.HfApi(token=training.get("hub_token"))
