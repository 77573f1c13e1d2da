"""Training steps of a random NF4 model, timed, with their memory; `args` are those of train_step.py.

`contestant` is "ours" or a peer with stock attention: "transformers" (plain transformers + PEFT with gradient
checkpointing, as PEFT's documentation has it), "trl" (TRL's SFTTrainer, whose loss works in chunks), "liger" (its
kernels in the first) or "unsloth".
"""

import argparse
import resource
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import replace

import torch
from hardware_use import hardware_use
from live_memory import PeakMemory
from peer_models import unsloth_model, with_liger_kernels, with_stock_adapter
from peft import PeftModel
from random_nf4_model import random_nf4_model, shape_config
from step_profile import format_profile, profile_step
from tqdm import tqdm
from trl_step import trl_step

from longqlora.attention.binding import bind_attention
from longqlora.memory.layer_binding import apply_policy
from longqlora.memory.policy import CHECKPOINTED, POLICIES, STOCK, ActivationPolicy
from longqlora.model.adapter import attach_adapter, trainable_table
from longqlora.model.context import extend_rope
from longqlora.model.loss_binding import bind_chunked_loss
from longqlora.settings.config import AdapterConfig, AttentionConfig, MemoryConfig


def policy_of(args: argparse.Namespace) -> ActivationPolicy:
    """The policy that the flags ask for, as train.py resolves them."""
    names = ("layer_function", "keep_activations", "tile_size", "num_head_chunks", "offload_activations")
    memory = MemoryConfig(memory=args.memory, **{name: getattr(args, name) for name in names})
    if memory.layer_function is False or not (memory.memory or memory.parts):
        return CHECKPOINTED if args.gradient_checkpointing else STOCK
    return replace(POLICIES[memory.memory or "balanced"], **memory.parts)


def build(
    args: argparse.Namespace, dtype: torch.dtype, device: torch.device
) -> tuple[PeftModel, torch.optim.Optimizer]:
    """The model as train.py puts it together, or as a peer does, and its optimizer."""
    config = shape_config(args.shape)
    print(extend_rope(config, args.seq_len))
    if args.contestant == "unsloth":
        return unsloth_model(config, args, dtype), None
    model = random_nf4_model(config, dtype=dtype, device=device)
    if args.contestant == "liger":
        model = with_liger_kernels(model)
    if args.contestant != "ours":
        return with_stock_adapter(model, args), None
    attention = AttentionConfig(attention=args.attention, group_size_ratio=args.group_size_ratio)
    print(bind_attention(model, attention, args.seq_len))
    print(bind_chunked_loss(model))
    adapter = AdapterConfig(lora_rank=args.lora_rank, train_embedding=args.train_embedding, train_norm=args.train_norm)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = attach_adapter(model, adapter).train()
    policy = policy_of(args)
    print(policy.describe())
    apply_policy(model, policy, device)
    if policy.gradient_checkpointing:
        base = model.get_base_model()
        # transformers renamed it; the old name warns.
        enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return model, make_optimizer(model, args.optim)


def make_optimizer(model: torch.nn.Module, name: str) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    if name == "adamw_torch":
        return torch.optim.AdamW(trained, lr=1e-4, fused=True)
    import bitsandbytes as bnb

    kinds = {"paged_adamw_32bit": bnb.optim.PagedAdamW32bit, "paged_adamw_8bit": bnb.optim.PagedAdamW8bit}
    return kinds[name](trained, lr=1e-4)


def make_step(
    args: argparse.Namespace,
    model: PeftModel,
    optimizer: torch.optim.Optimizer,
    dtype: torch.dtype,
    device: torch.device,
) -> Callable[[], float]:
    """A function that takes one optimizer step on a fixed random batch [B, S] and returns its loss."""
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (args.batch_size, args.seq_len), generator=generator).to(device)

    def step() -> float:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = model(input_ids=ids, labels=ids).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def held_bytes(model: PeftModel) -> int:
    """Bytes of all weights and buffers, with the quantisation constants of the 4-bit ones."""
    tensors = [*model.parameters(), *model.buffers()]
    for parameter in list(tensors):
        state = getattr(parameter, "quant_state", None)
        while state is not None:
            tensors += [state.absmax, state.code]
            state = state.state2
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


def measure(args: argparse.Namespace, dtype: torch.dtype, device: torch.device) -> dict:
    """Build the model, take one step to warm up and count memory, then time `args.steps` steps."""
    start = time.perf_counter()
    model, optimizer = build(args, dtype, device)
    if args.contestant == "trl":
        model, step = trl_step(args, model, dtype)
    else:
        optimizer = optimizer or make_optimizer(model, args.optim)
        step = make_step(args, model, optimizer, dtype, device)
    print(f"{trainable_table(model)}\nbuilt in {time.perf_counter() - start:.1f} s", flush=True)
    result = {"weight_bytes": held_bytes(model)}
    if device.type == "cuda":
        result["build_peak_allocated_bytes"] = torch.cuda.max_memory_allocated(device)
    losses, seconds, cpu_seconds = [], [], []
    # The first step makes the optimizer's state. Counting tensors on a CPU takes time, hence not in a timed step.
    with PeakMemory(device) as memory:
        losses.append(step())
    for _ in tqdm(range(args.steps), desc="timed steps", unit="step", leave=False):
        start = time.perf_counter(), time.process_time()
        losses.append(step())
        seconds.append(time.perf_counter() - start[0])
        cpu_seconds.append(time.process_time() - start[1])
    result["extra_bytes"] = memory.peak_bytes
    if device.type == "cuda":
        result["peak_allocated_bytes"] = torch.cuda.max_memory_allocated(device)
        result["peak_reserved_bytes"] = torch.cuda.max_memory_reserved(device)
    else:
        result["peak_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    median = statistics.median(seconds)
    speed = {"tokens_per_second": args.batch_size * args.seq_len / median, "median_seconds": median}
    if args.contestant == "ours":
        speed |= hardware_use(args, policy_of(args), dtype, device, median)
    if args.profile:
        result["profile"] = profile_step(step, device)
        print(format_profile(result["profile"]))
    return {**speed, **result, "seconds": seconds, "cpu_seconds": cpu_seconds, "losses": losses}
