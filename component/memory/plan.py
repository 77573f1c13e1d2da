"""Which mechanisms a run gets, what they are predicted to take, and what to do where that is too much.

Everything here is decided from the settings and config.json, before weights are loaded.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from transformers import PretrainedConfig, TrainingArguments

from longqlora.device import GIB, free_host_memory, is_out_of_memory, parse_size
from longqlora.distributed import world_size
from longqlora.memory.decoder_layer import reason_unsupported_config
from longqlora.memory.estimate import MemoryEstimate, optimizer_bytes, predict
from longqlora.memory.policy import (
    CANDIDATES,
    CHECKPOINTED,
    POLICIES,
    STOCK,
    STOCK_CANDIDATES,
    ActivationPolicy,
    own_settings,
    settings_in_vain,
)
from longqlora.memory.shapes import ModelShape, RunShape
from longqlora.settings.config import INPUT
from longqlora.settings.deepspeed import gradient_buffers, offloads_optimizer, shards, zero_stage
from longqlora.settings.machine import has_gpu
from longqlora.settings.reader import Settings, fields_of

# `memory: auto` plans for this part of the memory: the prediction was held to 10% of counted bytes, on a CPU.
AUTO_SHARE = 0.92
CHECKPOINTING_KEY = next(
    key for key in ("activation_checkpointing", "gradient_checkpointing") if key in fields_of(TrainingArguments)
)


@dataclass(frozen=True)
class Plan:
    """ActivationPolicy with their predicted memory; capacity in bytes, None where nothing limits it; notices to log."""

    policy: ActivationPolicy
    estimate: MemoryEstimate
    capacity: float | None
    advice: str
    notices: list[str]

    @property
    def fits(self) -> bool:
        return self.capacity is None or self.estimate.peak <= self.capacity

    def describe(self) -> str:
        """One line for the log."""
        estimate = self.estimate
        host = f", {estimate.host / GIB:.1f} GiB of host memory" if estimate.host else ""
        limit = f" of {self.capacity / GIB:.1f}" if self.capacity else ""
        return f"memory: {self.policy.describe()}; predicted peak {estimate.peak / GIB:.2f}{limit} GiB{host}"


def plan_memory(settings: Settings, config: PretrainedConfig) -> Plan:
    """Choose the policy, and put what transformers must know of them into `settings`.

    Raises ValueError, with what would fit, where the prediction is beyond the GPU at hand or `gpu_memory`.
    """
    notices: list[str] = []
    capacity = capacity_of(settings)
    policy = choose(settings, config, capacity, notices)
    plan = make_plan(settings, config, policy, capacity, notices)
    if host_shortage(settings, plan.estimate):
        raise ValueError(
            f"memory: {policy.describe()} needs {plan.estimate.host / GIB:.1f} GiB of host memory, "
            f"{free_host_memory() / GIB:.1f} GiB are free; set keep_activations: input, or offload_activations: false"
        )
    if not plan.fits:
        raise ValueError(
            f"memory: {policy.describe()} is predicted to take {plan.estimate.peak / GIB:.1f} GiB of the "
            f"{capacity / GIB:.1f} GiB at hand; {plan.advice}"
        )
    settings.training[CHECKPOINTING_KEY] = policy.gradient_checkpointing
    if policy.optim and has_gpu(settings):
        settings.training["optim"] = policy.optim
    return plan


def make_plan(settings, config, policy: ActivationPolicy, capacity: float | None, notices: list[str]) -> Plan:
    """The plan for given policy, with advice should they not be enough."""
    estimate = predict(ModelShape.of(config), run_shape(settings, policy), policy)
    return Plan(policy, estimate, capacity, advice(settings, config, policy, capacity), notices)


def capacity_of(settings: Settings) -> float | None:
    if settings.memory.gpu_memory:
        return parse_size(settings.memory.gpu_memory, "gpu_memory")
    return torch.cuda.get_device_properties(0).total_memory if has_gpu(settings) else None


def candidates_of(settings: Settings, config: PretrainedConfig) -> tuple[tuple[ActivationPolicy, ...], str | None]:
    """Sets of policy from the fastest to the leanest, and why the layer function is not among them, if so."""
    reason = reason_unsupported_config(config)
    if reason is None and zero_stage(settings.training.get("deepspeed")) == 3:
        reason = "DeepSpeed ZeRO-3 holds a part of each weight only"
    return (CANDIDATES, None) if reason is None else (STOCK_CANDIDATES, reason)


def choose(
    settings: Settings, config: PretrainedConfig, capacity: float | None, notices: list[str]
) -> ActivationPolicy:
    memory, checkpoints = settings.memory, bool(settings.training.get(CHECKPOINTING_KEY))
    own = own_settings(memory)
    candidates, reason = candidates_of(settings, config)
    if memory.layer_function and reason:
        raise ValueError(f"layer_function: not available, since {reason}; set layer_function: false")
    if not sets_optimizer(settings):
        candidates = tuple(replace(candidate, optim=None) for candidate in candidates)
    wants_layers = memory.layer_function is not False and (memory.memory or own)
    if not wants_layers or reason:
        details = [name for name in own if name != "layer_function"]
        cause = f"since {reason}" if reason else "with layer_function: false"
        notices += [f"{name} has no effect {cause}" for name in details]
        if reason and memory.memory:
            notices.append(f"memory: the layer function is not used, since {reason}")
        if memory.memory in (None, "auto"):
            chosen = CHECKPOINTED if checkpoints else STOCK
            if memory.memory == "auto":
                chosen = fastest_that_fits(settings, config, STOCK_CANDIDATES, capacity, notices)
            return chosen
        return STOCK if memory.memory == "fast" else CHECKPOINTED
    if settings.given.get(CHECKPOINTING_KEY):
        notices.append(f"{CHECKPOINTING_KEY} has no effect with the layer function (memory)")
    num_kv_heads = ModelShape.of(config).num_kv_heads
    notices += settings_in_vain(memory, is_on_gpu=is_on_gpu(settings), num_kv_heads=num_kv_heads)
    if memory.memory == "auto":
        return fastest_that_fits(
            settings, config, [replace(candidate, **own) for candidate in candidates], capacity, notices
        )
    policy = POLICIES[memory.memory or "balanced"]
    return replace(policy, **own, optim=policy.optim if sets_optimizer(settings) else None)


def fastest_that_fits(settings, config, candidates, capacity: float | None, notices: list[str]) -> ActivationPolicy:
    """The set of `candidates` with the least work of those that fit, or the one that takes least memory.

    What was to choose from goes into `notices`.
    """
    shape = ModelShape.of(config)
    estimates = {candidate: predict(shape, run_shape(settings, candidate), candidate) for candidate in candidates}
    notices += [
        f"memory: auto can take {candidate.describe()}: {x.peak / GIB:.2f} GiB" for candidate, x in estimates.items()
    ]
    fitting = [
        candidate
        for candidate, estimate in estimates.items()
        if (capacity is None or estimate.peak <= AUTO_SHARE * capacity) and not host_shortage(settings, estimate)
    ]
    if not fitting:
        return min(candidates, key=lambda candidate: estimates[candidate].peak)
    return min(fitting, key=lambda candidate: estimates[candidate].relative_time)


def host_shortage(settings: Settings, estimate: MemoryEstimate) -> bool:
    """Whether this machine's RAM is too small for what would be kept there."""
    free = free_host_memory()
    return has_gpu(settings) and free is not None and estimate.host > free


def sets_optimizer(settings: Settings) -> bool:
    """Whether the policy may choose the optimizer: nobody else did, and its state lives on a GPU."""
    deepspeed = settings.training.get("deepspeed")
    is_taken = settings.given.get("optim") or "optimizer" in (deepspeed or {}) or offloads_optimizer(deepspeed)
    return is_on_gpu(settings) and not is_taken


def is_on_gpu(settings: Settings) -> bool:
    """Whether the plan is for a GPU: the one at hand, or one whose memory was named."""
    return has_gpu(settings) or settings.memory.gpu_memory is not None


def run_shape(settings: Settings, policy: ActivationPolicy) -> RunShape:
    """What the settings say of memory."""
    training, adapter, attention = settings.training, settings.adapter, settings.attention
    deepspeed = training.get("deepspeed")
    kind, is_16_bit = adapter.finetuning_type, bool(training.get("fp16") or training.get("bf16"))
    optim = policy.optim if policy.optim and not settings.given.get("optim") else training.get("optim", "")
    length = settings.data.max_seq_length
    is_s2 = attention.attention == "s2"
    is_shared = settings.parallel.sequence_parallel_size > 1
    weight_shards, state_shards = shards(deepspeed, world_size())
    by_kernels = attention.attention in ("s2", "full") and not attention.use_flash_attn and not is_shared
    return RunShape(
        num_tokens=-(-length // settings.parallel.sequence_parallel_size),
        num_rows=training.get("per_device_train_batch_size", 1),
        stream_bytes=2 if is_16_bit and kind != "full" else 4,
        weights={"qlora": "nf4", "lora": "plain", "full": "trained"}[kind],
        lora_rank=adapter.lora_rank,
        lora_targets=lora_targets(adapter.target_modules),
        num_trained_embeddings={True: 2, INPUT: 1}.get(adapter.train_embedding, 0),
        attended=attention.group_size(length) if is_s2 else length,
        by_kernels=by_kernels,
        optimizer_bytes=0 if offloads_optimizer(deepspeed) else optimizer_bytes(optim),
        buffers=gradient_buffers(deepspeed, element_bytes=2 if is_16_bit else 4),
        weight_shards=weight_shards,
        state_shards=state_shards,
        is_gpu=is_on_gpu(settings),
    )


def lora_targets(names: str | None) -> tuple[str, ...] | None:
    known = ModelShape(1, 1, 1, 1, 1, 1, 1).linears
    targets = tuple(name.strip() for name in (names or "").split(",") if name.strip() in known)
    return targets or None


def longest_length(settings, config, policy: ActivationPolicy, capacity: float) -> int:
    """Most tokens of a row that fit `capacity` bytes; 0 where not even the weights do."""
    shape, run = ModelShape.of(config), run_shape(settings, policy)
    low, high = 0, 2**26
    while high - low > max(1, low // 1000):
        middle = (low + high) // 2
        attended = run.attended * middle // run.num_tokens
        estimate = predict(shape, replace(run, num_tokens=middle, attended=max(1, attended)), policy)
        low, high = (middle, high) if estimate.peak <= capacity else (low, middle)
    return low


def advice(settings: Settings, config: PretrainedConfig, policy: ActivationPolicy, capacity: float | None) -> str:
    """What takes less memory than `policy`, as settings to add."""
    candidates, _ = candidates_of(settings, config)
    here = predict(ModelShape.of(config), run_shape(settings, policy), policy).peak
    limit = here if capacity is None else min(capacity, here)
    for leaner in candidates:
        peak = predict(ModelShape.of(config), run_shape(settings, leaner), leaner).peak
        if peak < 0.95 * limit or (capacity is not None and peak <= capacity < here):
            return f"add {yaml_lines(leaner, '; ')} (predicted {peak / GIB:.1f} GiB)"
    longest = longest_length(settings, config, candidates[-1], 0.95 * limit)
    leanest = f"the leanest settings ({yaml_lines(candidates[-1], '; ')})"
    if longest < 2:
        return f"{leanest} do not fit at any length; use a smaller model, or a larger GPU"
    return f"{leanest} reach max_seq_length: {longest}; lower it"


def yaml_lines(policy: ActivationPolicy, separator: str = "\n") -> str:
    """The settings that ask for `policy`."""
    if not policy.layer_function:
        return f"{CHECKPOINTING_KEY}: {str(policy.gradient_checkpointing).lower()}"
    names = ("keep_activations", "tile_size", "num_head_chunks", "offload_activations")
    options = []
    for word, base in POLICIES.items():
        changed = [name for name in names if getattr(policy, name) != getattr(base, name)]
        lines = [f"{name}: {str(getattr(policy, name)).lower()}" for name in changed]
        options.append([f"memory: {word}", *lines])
    return separator.join(min(options, key=len))


@contextmanager
def advice_on_out_of_memory(plan: Plan) -> Iterator[None]:
    """Turn an out-of-memory error into one line that says what takes less."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        failure = ValueError(f"out of memory with {plan.policy.describe()}; {plan.advice}")
        failure.from_one_rank = True
        raise failure from error
