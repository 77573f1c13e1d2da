"""What a checkpoint must hold before a run goes on from it: every file of its state, whole, and none that runs code.

A file of torch.save is a pickle, which can name any function to be called when it is read. transformers reads its
files with weights_only=True; DeepSpeed 0.19 does not, so torch is told to for the whole process.
"""

import os
from importlib import import_module
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError, safe_open
from transformers import TrainerState
from transformers.trainer_pt_utils import safe_globals

from longqlora.settings.deepspeed import zero_stage
from longqlora.training.checkpoint import MARK_OF_COMPLETENESS

TAG_FILE = "latest"
# What else than tensors and plain values DeepSpeed's states hold (0.19.8; the dynamic scaler with fp16).
DEEPSPEED_CLASSES = (
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)
PICKLES = (".pt", ".pth", ".bin")
NEVER_READ = "training_args.bin"
FIX = "resume from another checkpoint, or start from the beginning"


def load_without_code(*, uses_deepspeed: bool) -> None:
    """From here on torch.load runs no code from a file, whatever its caller says; what DeepSpeed needs is allowed."""
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    # torch refuses to load anything where both are set.
    os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)
    if uses_deepspeed:
        places = (name.rsplit(".", 1) for name in DEEPSPEED_CLASSES)
        torch.serialization.add_safe_globals([getattr(import_module(module), name) for module, name in places])


def check_contents(checkpoint: Path, settings: dict, *, num_processes: int) -> None:
    """Refuse a checkpoint whose state is not whole or would run code. Reads no tensor.

    settings: of the run that goes on; num_processes: of the run that wrote it. Raises ValueError naming the file.
    """
    check_trainer_state(checkpoint / MARK_OF_COMPLETENESS)
    missing = [name for name in needed_files(checkpoint, settings, num_processes) if not any(checkpoint.glob(name))]
    if missing:
        raise ValueError(
            f"resume_from_checkpoint: {checkpoint} lacks {', '.join(name.replace('*', '') for name in missing)}, "
            f"without which the losses would differ; {FIX} (deepspeed and save_only_model must be as they were)"
        )
    for file in sorted(checkpoint.rglob("*")):
        if file.suffix == ".safetensors":
            check_tensors(file)
        elif file.suffix in PICKLES and file.name != NEVER_READ:
            check_pickle(file)


def check_trainer_state(file: Path) -> None:
    try:
        state = TrainerState.load_from_json(str(file))
        is_whole = isinstance(state.global_step, int) and all(isinstance(entry, dict) for entry in state.log_history)
    except (ValueError, TypeError, AttributeError):
        is_whole = False
    if not is_whole:
        raise ValueError(f"resume_from_checkpoint: {file} is damaged; {FIX}")


def needed_files(checkpoint: Path, settings: dict, num_processes: int) -> list[str]:
    """Patterns of the files that transformers and DeepSpeed go on from, relative to the checkpoint."""
    ranks = range(num_processes)
    names = [f"rng_state_{rank}.pth" for rank in ranks] if num_processes > 1 else ["rng_state.pth"]
    deepspeed = settings.get("deepspeed")
    if not deepspeed:
        weights = "model.safetensors*" if settings["finetuning_type"] == "full" else "adapter_model.safetensors"
        return [weights, "optimizer.pt", "scheduler.pt", *(["scaler.pt"] if settings.get("fp16") else []), *names]
    if "scheduler" not in deepspeed:
        names.append("scheduler.pt")
    folder, stage = deepspeed_folder(checkpoint), zero_stage(deepspeed)
    shards = [f"zero_pp_rank_{rank}_mp_rank_00" for rank in ranks]
    models = shards if stage == 3 else ["mp_rank_00"]
    return [
        *names,
        *(f"{folder}/{name}_model_states.pt" for name in models),
        *(f"{folder}/*{name}_optim_states.pt" for name in shards if stage),
    ]


def deepspeed_folder(checkpoint: Path) -> str:
    """Name of the folder with DeepSpeed's states, which the file `latest` gives."""
    file = checkpoint / TAG_FILE
    tag = file.read_text(errors="replace").strip() if file.is_file() else ""
    if not tag or Path(tag).name != tag or not (checkpoint / tag).is_dir():
        raise ValueError(
            f"resume_from_checkpoint: {file} names no folder of DeepSpeed's states in it; {FIX} (or without deepspeed, "
            "if it was written so)"
        )
    return tag


def check_tensors(file: Path) -> None:
    try:
        with safe_open(file, framework="pt"):
            pass
    except SafetensorError as error:
        raise damaged(file, error) from None


def check_pickle(file: Path) -> None:
    """Refuse a file of torch.save that is cut off, or that names a function or class not known to be harmless."""
    try:
        with safe_globals():
            foreign = set(torch.serialization.get_unsafe_globals_in_checkpoint(file)) - set(DEEPSPEED_CLASSES)
    except (ValueError, RuntimeError, OSError, EOFError, UnpicklingError) as error:
        raise damaged(file, error) from None
    if foreign:
        raise ValueError(
            f"resume_from_checkpoint: {file} would run {', '.join(sorted(foreign))} when it is loaded, which no "
            f"checkpoint of this trainer holds; delete it if you do not know who made it, and {FIX}"
        )


def damaged(file: Path, error: Exception) -> ValueError:
    reason = str(error).split(".")[0] or type(error).__name__
    return ValueError(f"resume_from_checkpoint: {file} is damaged or cannot be read ({reason}); {FIX}")
