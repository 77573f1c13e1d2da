"""Which activation policy a run gets, what it is predicted to take, and what to do where that is too much.

Everything here is decided from the settings and config.json, before weights are loaded.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from transformers import PretrainedConfig

from longqlora.attention.model_internals import takes_checkpointing
from longqlora.device import GIB, free_host_memory, is_out_of_memory, parse_size
from longqlora.distributed import world_size
from longqlora.memory.decoder_layer import reason_unsupported
from longqlora.memory.estimate import MemoryEstimate, ModelShape, RunShape, optimizer_bytes, predict
from longqlora.memory.policy import CANDIDATES, CHECKPOINTED, CHECKPOINTING_KEY, POLICIES, STOCK, ActivationPolicy
from longqlora.settings.config import INPUT, Notice, Settings, warning
from longqlora.settings.deepspeed import gradient_buffers, offloads, shards, zero_stage

# `memory: auto` plans for this part of the memory: the prediction was held to 10% of counted bytes, on a CPU.
AUTO_SHARE = 0.92


def plan_memory(settings: Settings, config: PretrainedConfig) -> tuple["MemoryPlan", Settings, list[Notice]]:
    """The plan of a run, the settings with what transformers must know of it, and notices for the log.

    Raises ValueError, with what would fit, where the prediction is beyond this machine's GPU or `gpu_memory`.
    """
    plan = MemoryPlan.of(settings, config)
    policies, notices = asked_for(settings, plan)
    if settings.memory.memory == "auto":
        offers = {policy.describe(): plan.predict(policy).peak / GIB for policy in policies}
        notices += [Notice(f"memory: auto can take {policy}: {peak:.2f} GiB") for policy, peak in offers.items()]
    policy = plan.fastest(policies)
    plan = replace(plan, policy=policy)
    if policy.gradient_checkpointing and not takes_checkpointing(config):
        text = f"{config.model_type} takes neither the layer function nor gradient checkpointing"
        raise ValueError(f"memory: {text}; leave it out, with gradient_checkpointing: false")
    needed, free, peak = plan.estimate.host, plan.host_capacity, plan.estimate.peak
    if needed > free:
        raise ValueError(
            f"memory: {policy.describe()} needs {needed / GIB:.1f} GiB of host memory, {free / GIB:.1f} GiB are free; "
            "set keep_activations: input, or offload_activations: false"
        )
    if peak > plan.capacity:
        raise ValueError(
            f"memory: {policy.describe()} is predicted to take {peak / GIB:.1f} GiB of the {plan.capacity / GIB:.1f} "
            f"GiB available; {plan.advice()}"
        )
    changes = {CHECKPOINTING_KEY: policy.gradient_checkpointing}
    if policy.optim and settings.uses_gpu:
        changes["optim"] = policy.optim
    return plan, settings.with_training(**changes), [*notices, Notice(plan.describe())]


def asked_for(settings: Settings, plan: "MemoryPlan") -> tuple[list[ActivationPolicy], list[Notice]]:
    """The policy that the settings ask for, or those that auto can take; and what becomes of what they ask in vain."""
    memory, own, reason = settings.memory, settings.memory.parts, plan.reason
    if memory.layer_function and reason:
        raise ValueError(f"layer_function: not available, since {reason}; set layer_function: false")
    if reason or memory.layer_function is False or not (memory.memory or own):
        cause = f"since {reason}" if reason else "with layer_function: false"
        notices = [warning(f"{name} has no effect {cause}") for name in own if name != "layer_function"]
        if reason and memory.memory:
            notices.append(Notice(f"memory: the layer function is not used, since {reason}"))
        unnamed = [CHECKPOINTED if settings.training.get(CHECKPOINTING_KEY) else STOCK]
        policies = {None: unnamed, "fast": [STOCK], "auto": [STOCK, CHECKPOINTED]}
        return policies.get(memory.memory, [CHECKPOINTED]), notices
    notices = []
    if settings.given.get(CHECKPOINTING_KEY):
        notices.append(warning(f"{CHECKPOINTING_KEY} has no effect with the layer function (memory)"))
    if memory.offload_activations and not plan.run.is_gpu:
        text = "offload_activations has no effect without a GPU: activations are in host memory as it is"
        notices.append(warning(text))
    num_kv_heads = plan.model.num_kv_heads
    if (memory.num_head_chunks or 0) > num_kv_heads:
        notices.append(Notice(f"num_head_chunks: {memory.num_head_chunks} acts as {num_kv_heads}, the key/value heads"))
    policies = plan.candidates
    if memory.memory != "auto":
        policies = [policies[CANDIDATES.index(POLICIES[memory.memory or "balanced"])]]
    return [replace(policy, **own) for policy in policies], notices


@dataclass(frozen=True)
class MemoryPlan:
    """What decides the memory of a run, the policies that it can have, from the fastest to the leanest, and the chosen.

    reason: why the layer function is not among them, if so; capacity, host_capacity: bytes, infinite without a limit.
    """

    model: ModelShape
    run: RunShape
    candidates: tuple[ActivationPolicy, ...]
    reason: str | None
    capacity: float
    host_capacity: float
    policy: ActivationPolicy = STOCK

    @classmethod
    def of(cls, settings: Settings, config: PretrainedConfig) -> "MemoryPlan":
        deepspeed, model, capacity = settings.training.get("deepspeed"), ModelShape.of(config), math.inf
        reason = reason_unsupported(config)
        if reason is None and zero_stage(deepspeed) == 3:
            reason = "DeepSpeed ZeRO-3 holds a part of each weight only"
        if settings.memory.gpu_memory:
            capacity = parse_size(settings.memory.gpu_memory, "gpu_memory")
        elif settings.uses_gpu:
            capacity = torch.cuda.get_device_properties(0).total_memory
        host_capacity = free_host_memory() if settings.uses_gpu else math.inf
        run = run_shape(settings, model, is_gpu=math.isfinite(capacity))
        candidates = (STOCK, CHECKPOINTED) if reason else CANDIDATES
        # A policy brings its optimizer where nobody else chose one, and to a GPU, where its state lives.
        is_taken = settings.given.get("optim") or "optimizer" in (deepspeed or {}) or offloads(deepspeed, "optimizer")
        if is_taken or not run.is_gpu:
            candidates = tuple(replace(policy, optim=None) for policy in candidates)
        return cls(model, run, candidates, reason, capacity, host_capacity)

    @property
    def estimate(self) -> MemoryEstimate:
        return self.predict(self.policy)

    def describe(self) -> str:
        """One line for the log."""
        host = f", {self.estimate.host / GIB:.1f} GiB of host memory" if self.estimate.host else ""
        limit = f" of {self.capacity / GIB:.1f}" if math.isfinite(self.capacity) else ""
        return f"memory: {self.policy.describe()}; predicted peak {self.estimate.peak / GIB:.2f}{limit} GiB{host}"

    def predict(self, policy: ActivationPolicy, num_tokens: int | None = None) -> MemoryEstimate:
        """The prediction for rows of the run's length, or of another."""
        run = self.run if num_tokens is None else self.run.at_length(num_tokens)
        if policy.optim:
            run = replace(run, optimizer_bytes=optimizer_bytes(policy.optim))
        return predict(self.model, run, policy)

    def fastest(self, policies: Iterable[ActivationPolicy]) -> ActivationPolicy:
        """The policy with the least work of those that fit, or the one that takes least memory."""
        estimates, limit = {policy: self.predict(policy) for policy in policies}, AUTO_SHARE * self.capacity
        fitting = [policy for policy, x in estimates.items() if x.peak <= limit and x.host <= self.host_capacity]
        if not fitting:
            return min(estimates, key=lambda policy: estimates[policy].peak)
        return min(fitting, key=lambda policy: estimates[policy].relative_time)

    def longest(self, policy: ActivationPolicy, capacity: float) -> int:
        """Most tokens of a row that fit `capacity` bytes; 0 where not even the weights do."""
        low, high = 0, 2**26
        while high - low > max(1, low // 1000):
            middle = (low + high) // 2
            low, high = (middle, high) if self.predict(policy, middle).peak <= capacity else (low, middle)
        return low

    def advice(self) -> str:
        """What takes less memory than the chosen policy, as settings to add."""
        here = self.estimate.peak
        limit = min(self.capacity, here)
        for leaner in self.candidates:
            peak = self.predict(leaner).peak
            if peak < 0.95 * limit or peak <= self.capacity < here:
                return f"add {'; '.join(leaner.as_settings())} (predicted {peak / GIB:.1f} GiB)"
        leanest = self.candidates[-1]
        longest = self.longest(leanest, 0.95 * limit)
        text = f"the leanest settings ({'; '.join(leanest.as_settings())})"
        if longest < 2:
            return f"{text} do not fit at any length; use a smaller model, or a larger GPU"
        return f"{text} reach max_seq_length: {longest}; lower it"

    @contextmanager
    def advice_on_out_of_memory(self) -> Iterator[None]:
        """Turn an out-of-memory error into one line that says what takes less."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            failure = ValueError(f"out of memory with {self.policy.describe()}; {self.advice()}")
            failure.from_one_rank = True
            raise failure from error

    def table(self, lengths: list[int]) -> dict:
        """JSON-ready: for each policy its predicted GiB by length, the longest length, host GiB there, relative time;
        and for each length the settings of the fastest policy that fits (None where none does)."""
        rows, room = [], AUTO_SHARE * self.capacity / GIB
        for policy in dict.fromkeys((STOCK, CHECKPOINTED, *self.candidates)):
            longest, estimates = self.longest(policy, self.capacity), {n: self.predict(policy, n) for n in lengths}
            rows.append({
                "mechanisms": policy.describe(),
                "settings": policy.as_settings(),
                "peak_gib": {str(length): estimate.peak / GIB for length, estimate in estimates.items()},
                "longest": longest,
                "host_gib": self.predict(policy, max(longest, 2)).host / GIB,
                "relative_time": estimates[lengths[0]].relative_time,
            })  # fmt: skip
        by_time = sorted(rows, key=lambda row: row["relative_time"])
        fastest = {
            length: next((row["settings"] for row in by_time if row["peak_gib"][length] <= room), None)
            for length in map(str, lengths)
        }
        return {"capacity_gib": self.capacity / GIB, "sets": rows, "fastest": fastest, "reason": self.reason}


def run_shape(settings: Settings, model: ModelShape, *, is_gpu: bool) -> RunShape:
    """What the settings say of memory, whatever the policy."""
    training, adapter, attention = settings.training, settings.adapter, settings.attention
    deepspeed, length = training.get("deepspeed"), settings.data.max_seq_length
    kind, is_16_bit = adapter.finetuning_type, bool(training.get("fp16") or training.get("bf16"))
    row_shards = settings.parallel.sequence_parallel_size
    weight_shards, state_shards = shards(deepspeed, world_size())
    names = [name.strip() for name in (adapter.target_modules or "").split(",")]
    attended = attention.group_size(length) if attention.attention == "s2" else length
    return RunShape(
        num_tokens=length,
        num_rows=training.get("per_device_train_batch_size", 1),
        activation_bytes=2 if is_16_bit and kind != "full" else 4,
        weights={"qlora": "nf4", "lora": "plain", "full": "trained"}[kind],
        lora_rank=adapter.lora_rank,
        lora_targets=tuple(name for name in names if name in model.linears) or None,
        num_trained_embeddings={True: 2, INPUT: 1}.get(adapter.train_embedding, 0),
        # The mean over all steps, for their time: memory does not depend on it (tests/memory/).
        attended=round(attended + attention.dense_part * (length - attended)),
        by_kernels=attention.attention in ("s2", "full") and not attention.use_flash_attn and row_shards == 1,
        optimizer_bytes=0 if offloads(deepspeed, "optimizer") else optimizer_bytes(training.get("optim", "")),
        buffers=gradient_buffers(deepspeed, element_bytes=2 if is_16_bit else 4),
        row_shards=row_shards,
        weight_shards=weight_shards,
        state_shards=state_shards,
        is_gpu=is_gpu,
    )
