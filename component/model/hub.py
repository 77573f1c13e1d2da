"""The Hugging Face hub from a machine that may have no network."""

import os
import socket
import urllib.request

TIMEOUT = 3  # seconds


def go_offline_unless_reachable() -> None:
    """Where the hub cannot be reached, tell its libraries so; to be called before they are imported.

    They would ask for every file again and again otherwise, for half a minute. What the user set stays.
    """
    if "HF_HUB_OFFLINE" not in os.environ and not is_reachable():
        os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"


def is_reachable() -> bool:
    """Whether the hub answers; behind a proxy it is taken to."""
    if urllib.request.getproxies():
        return True
    host = os.environ.get("HF_ENDPOINT", "https://huggingface.co").split("://")[-1].split("/")[0].split(":")[0]
    try:
        with socket.create_connection((host, 443), timeout=TIMEOUT):
            return True
    except OSError:
        return False
