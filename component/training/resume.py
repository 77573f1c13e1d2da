"""Checkpoints to resume from: found, checked for missing, damaged or unsafe files, compared with the present run.

A file of torch.save is a pickle, which can name any function to be called when it is read. transformers reads its
files with weights_only=True; DeepSpeed 0.19 does not, so torch is told to for the whole process.
"""

import copy
import os
import random
import re
from collections import ChainMap
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from transformers import PreTrainedModel, TrainerControl, TrainerState
from transformers.trainer_pt_utils import safe_globals

from longqlora.data.source import joint_content, sources_of
from longqlora.distributed import is_main_process, world_size
from longqlora.files import read_json
from longqlora.model.adapter import attach_adapter
from longqlora.model.adapter_folder import read_adapter_weights
from longqlora.model.weight_files import check_weights
from longqlora.reading import COUNT, MAPPING, NONE, NUMBER, ROWS, TEXT, check_kinds, reading
from longqlora.run_record import read_run_record
from longqlora.settings.config import CHANGES_NO_LOSS, DataConfig, Notice, Settings, warning
from longqlora.settings.deepspeed import zero_stage

FINAL = "final"
TRAINER_STATE, DEEPSPEED_TAG, NEVER_READ = "trainer_state.json", "latest", "training_args.bin"
PICKLES = (".pt", ".pth", ".bin")
# What DeepSpeed's states hold beside tensors and plain values (0.19.8; the dynamic scaler with fp16).
DEEPSPEED_CLASSES = (
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)
OPTIMIZER = "optimizer.pt"
# Of trainer_state.json; grad_norm is nan after a step that fp16 skips.
NEEDED_STATE = ("global_step", "log_history")
STATE_KINDS = {
    "global_step": (COUNT,), "max_steps": (COUNT,), "num_train_epochs": (COUNT,), "epoch": (NUMBER, NONE),
    "num_input_tokens_seen": (COUNT,), "total_flos": (NUMBER,), "train_batch_size": (COUNT, NONE),
    "log_history": (ROWS,), "best_metric": (NUMBER, NONE), "best_global_step": (COUNT, NONE),
    "best_model_checkpoint": (TEXT, NONE), "stateful_callbacks": (MAPPING,),
    **dict.fromkeys(("logging_steps", "save_steps", "eval_steps"), (NUMBER, NONE)),
}  # fmt: skip
LOG_KINDS = {
    "step": (COUNT,),
    "epoch": (NUMBER, NONE),
    **dict.fromkeys(("loss", "eval_loss", "train_runtime"), (NUMBER,)),
}
FLAG, FIX = "resume_from_checkpoint", "resume from another checkpoint, or start from the beginning"


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [file.parent for file in Path(output_dir).glob(f"checkpoint-*/{TRAINER_STATE}")]
    folders = [folder for folder in found if re.fullmatch(r"checkpoint-\d+", folder.name)]
    return sorted(folders, key=lambda folder: int(folder.name.split("-")[1]))


def data_hashes(data: DataConfig) -> dict[str, str]:
    """SHA-256 of the data by its key, on rank 0, which compares and records them."""
    return {key: joint_content(sources_of(data, key)) for key in data.files} if is_main_process() else {}


def choose_start(settings: Settings) -> Path | None:
    """The checkpoint that the settings name, or None to start from the beginning; its content is not read.

    Raises ValueError where output_dir holds results of another run and nothing says what to do with them.
    """
    output_dir, start = Path(settings.training["output_dir"]), None
    requested, existing = settings.training.get(FLAG) or "false", list_checkpoints(output_dir)
    if requested.lower() == "true":
        start = existing[-1] if existing else None
    elif requested.lower() != "false":
        start = Path(requested)
        if not (start / TRAINER_STATE).is_file():
            raise ValueError(f"{FLAG}: {requested!r} has no {TRAINER_STATE}; give a complete checkpoint, or true")
    continues = start is not None and start.resolve() in [path.resolve() for path in existing]
    results = [path.name for path in existing[-1:]] + [FINAL] * (output_dir / FINAL).exists()
    if results and not continues and not settings.output.overwrite_output_dir:
        held = f"{str(output_dir)!r} holds {' and '.join(results)} of an earlier run"
        fix = f"add {f'--{FLAG} true to go on, ' if existing else ''}--overwrite_output_dir true to replace it"
        raise ValueError(f"output_dir: {held}; {fix}, or choose another folder")
    return start


def resume_point(settings: Settings, model: PreTrainedModel) -> tuple[Path | None, list[Notice]]:
    """The checkpoint that a run starts from, or None, and notices: that it does, and what changed since then.

    model: that of the run, on the meta device. Raises ValueError for a checkpoint that cannot be resumed, or is of
    another model or trains others of its weights, and where output_dir holds another run.
    """
    checkpoint = choose_start(settings)
    if checkpoint is None:
        output_dir = settings.training["output_dir"]
        return None, [Notice(f"no checkpoint in {output_dir!r} to resume from: starting from the beginning")]
    facts = {"world_size": world_size(), "data_sha256": data_hashes(settings.data)}
    changes = check_resumable(checkpoint, settings.as_dict(), **facts)
    check_weights_fit(checkpoint, model, settings)
    return checkpoint, [Notice(f"resuming from {checkpoint}"), *map(warning, changes)]


def check_resumable(checkpoint: Path, arguments: dict, *, world_size: int, data_sha256: dict[str, str]) -> list[str]:
    """Compare a checkpoint's run with the present one; returns a line for each change that changes the losses.

    arguments: settings by section; data_sha256: SHA-256 of the data files by key. Other data is a change as any other.
    Raises ValueError where resuming is impossible: a file missing, damaged or unsafe to load, or ZeRO's optimizer
    states of another number of processes.
    """
    new, record = dict(ChainMap(*arguments.values())), read_run_record(checkpoint)
    before = (record or {}).get("world_size", world_size)
    if new.get("deepspeed") and before != world_size:
        raise ValueError(f"{FLAG}: {checkpoint} is of {before} processes, which ZeRO needs again, not {world_size}")
    check_contents(checkpoint, new, num_processes=before)
    if record is None:
        return [f"{checkpoint} has no run record: its settings cannot be compared with the present ones"]
    old, old_hashes = dict(ChainMap(*record["arguments"].values())), record.get("data_sha256", {})
    # Paged or fused, it keeps the same state.
    names = [str(values.get("optim") or "adamw_torch") for values in (old, new)]
    optimizers = [name.removeprefix("paged_").removesuffix("_fused") for name in names]
    if optimizers[0] != optimizers[1] and not new.get("deepspeed"):
        text = f"optim was {names[0]!r} and is now {names[1]!r}, which cannot go on from its state"
        raise ValueError(f"{FLAG}: {checkpoint}: {text}; give optim as it was, or start from the beginning")
    for key in data_sha256.keys() & old_hashes.keys():
        # The content of a file counts, not its path.
        old[key], new[key] = (f"{new[key]} of SHA-256 {x[key][:12]}" for x in (old_hashes, data_sha256))
    old["number of processes"], new["number of processes"] = before, world_size
    return [
        f"{key} was {old.get(key)!r} and is now {new.get(key)!r}: the losses will differ"
        for key in sorted((old.keys() | new.keys()) - CHANGES_NO_LOSS)
        if old.get(key) != new.get(key)
    ]


def check_contents(checkpoint: Path, settings: dict, *, num_processes: int) -> None:
    """Refuse a checkpoint whose state is incomplete or would run code. Reads no tensor.

    settings: of the run that resumes; num_processes: of the run that wrote it. Raises ValueError naming the file.
    """
    check_trainer_state(checkpoint)
    missing = [name for name in needed_files(checkpoint, settings, num_processes) if not any(checkpoint.glob(name))]
    if missing:
        lack = f"{checkpoint} lacks {', '.join(missing).replace('*', '')}, without which the losses would differ"
        raise ValueError(f"{FLAG}: {lack}; {FIX} (deepspeed and save_only_model must be as they were)")
    for file in sorted(checkpoint.rglob("*")):
        if file.suffix == ".safetensors" or (file.suffix in PICKLES and file.name != NEVER_READ):
            check_file(file)
    for name, check in STATE_CHECKS.items():
        for file in checkpoint.glob(name):
            with reading(FLAG, file, FIX), safe_globals():
                # Of an optimizer the values stay on the disk.
                of_optimizer = {"map_location": "meta", "mmap": True} if name == OPTIMIZER else {"map_location": "cpu"}
                check(torch.load(file, weights_only=True, **of_optimizer))


def check_trainer_state(checkpoint: Path) -> None:
    """Refuse a trainer_state.json that the trainer could not go on from."""
    path = checkpoint / TRAINER_STATE
    values, place = read_json(path, FLAG), f"{FLAG}: {path}"
    check_kinds({name: values.get(name) for name in NEEDED_STATE} | values, STATE_KINDS, place)
    for entry in values["log_history"]:
        check_kinds({"step": None, **entry}, LOG_KINDS, f"{place}, log_history")
    with reading(FLAG, path, FIX):
        state = TrainerState.load_from_json(str(path))
        TrainerControl.from_state(state.stateful_callbacks.get("TrainerControl", TrainerControl().state()))
    if re.fullmatch(r"checkpoint-\d+", checkpoint.name) and checkpoint.name != f"checkpoint-{state.global_step}":
        raise ValueError(f"{place} is of step {state.global_step}, not of {checkpoint.name}; {FIX}")


def check_random_state(state: dict) -> None:
    random.Random().setstate(state["python"])
    np.random.RandomState().set_state(state["numpy"])
    torch.Generator().set_state(state["cpu"])


def check_optimizer_state(state: dict) -> None:
    if not isinstance(state["state"], dict) or not any(group["params"] for group in state["param_groups"]):
        raise ValueError("it holds no state of an optimizer")


def check_schedule(state: dict) -> None:
    check_kinds({"last_epoch": state["last_epoch"]}, {"last_epoch": (COUNT,)}, "its schedule")
    if not all(map(NUMBER[1], state.get("base_lrs", []))):
        raise ValueError("its learning rates are no numbers")


def check_weights_fit(checkpoint: Path, model: PreTrainedModel, settings: Settings) -> None:
    """Refuse a checkpoint that holds other weights than this run trains: of another model, rank or choice of layers."""
    if settings.adapter.finetuning_type == "full":
        check_weights(checkpoint, model, copy.deepcopy(model.config))
        return
    with torch.device("meta"):
        peft_model = attach_adapter(copy.deepcopy(model), settings.adapter)
    own = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    saved = read_adapter_weights(checkpoint, device="meta")
    for name in sorted(own.keys() | saved.keys()):
        shapes = [list(weights[name].shape) if name in weights else "no such weight" for weights in (saved, own)]
        if shapes[0] != shapes[1]:
            text = f"{checkpoint} has for {name!r} {shapes[0]}, this run {shapes[1]}"
            keys = "model_name_or_path, lora_rank, target_modules, train_embedding and train_norm"
            raise ValueError(f"{FLAG}: {text}; give {keys} as they were, or start from the beginning")


def needed_files(checkpoint: Path, settings: dict, num_processes: int) -> list[str]:
    """Patterns of the files that transformers and DeepSpeed resume from, relative to the checkpoint."""
    ranks = range(num_processes)
    names = [f"rng_state_{rank}.pth" for rank in ranks] if num_processes > 1 else ["rng_state.pth"]
    deepspeed = settings.get("deepspeed")
    if not deepspeed:
        weights = "model.safetensors*" if settings["finetuning_type"] == "full" else "adapter_model.safetensors"
        return [weights, "optimizer.pt", "scheduler.pt", *(["scaler.pt"] if settings.get("fp16") else []), *names]
    if "scheduler" not in deepspeed:
        names.append("scheduler.pt")
    tag_file = checkpoint / DEEPSPEED_TAG
    folder = tag_file.read_text(errors="replace").strip() if tag_file.is_file() else ""
    if not folder or Path(folder).name != folder or not (checkpoint / folder).is_dir():
        text = f"{tag_file} names no folder of DeepSpeed's states in it"
        raise ValueError(f"{FLAG}: {text}; {FIX} (or without deepspeed, if it was written so)")
    stage, shards = zero_stage(deepspeed), [f"zero_pp_rank_{rank}_mp_rank_00" for rank in ranks]
    models = shards if stage == 3 else ["mp_rank_00"]
    return [
        *names,
        *(f"{folder}/{name}_model_states.pt" for name in models),
        *(f"{folder}/*{name}_optim_states.pt" for name in shards if stage),
    ]


def check_file(file: Path) -> None:
    """Refuse a file that is cut off, or that names a function or class not known to be harmless."""
    unsafe = set()
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt"):
                pass
        else:
            with safe_globals():
                unsafe = set(torch.serialization.get_unsafe_globals_in_checkpoint(file)) - set(DEEPSPEED_CLASSES)
    except Exception as error:
        reason = str(error).split(".")[0] or type(error).__name__
        raise ValueError(f"{FLAG}: {file} is damaged or cannot be read ({reason}); {FIX}") from error
    if unsafe:
        names = ", ".join(sorted(unsafe))
        raise ValueError(f"{FLAG}: {file} would run {names}; delete it if you do not know who made it, and {FIX}")


# What is read of the files of a run without DeepSpeed, which would fail as the trainer does; with the errors of that.
STATE_CHECKS = {OPTIMIZER: check_optimizer_state, "scheduler.pt": check_schedule, "rng_state*.pth": check_random_state}


def load_without_code(*, uses_deepspeed: bool) -> None:
    """From here on torch.load runs no code from a file, whatever its caller says; what DeepSpeed needs is allowed."""
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    # torch refuses to load anything where both are set.
    os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)
    if uses_deepspeed:
        names = (name.rsplit(".", 1) for name in DEEPSPEED_CLASSES)
        torch.serialization.add_safe_globals([getattr(import_module(module), name) for module, name in names])
