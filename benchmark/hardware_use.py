"""How much of the device's arithmetic a training step uses: FLOPs as executed against a large matrix product."""

import argparse
import time

import torch
from random_nf4_model import shape_config

from longqlora.memory.estimate import ModelShape, RunShape, step_work
from longqlora.memory.policy import ActivationPolicy
from longqlora.settings.config import AttentionConfig


def hardware_use(
    args: argparse.Namespace, policy: ActivationPolicy, dtype: torch.dtype, device: torch.device, seconds: float
) -> dict:
    """FLOPs per second of a step of `seconds`, those of a matrix product in the same dtype, and their ratio (HFU)."""
    ratio = AttentionConfig(group_size_ratio=args.group_size_ratio)
    attended = ratio.group_size(args.seq_len) if args.attention == "s2" else args.seq_len
    run = RunShape(args.seq_len, args.batch_size, dtype.itemsize, lora_rank=args.lora_rank, attended=attended)
    work = step_work(ModelShape.of(shape_config(args.shape)), run, policy)
    rate = work * args.seq_len * args.batch_size / seconds
    peak = product_rate(dtype, device)
    return {"flops_per_second": rate, "product_flops_per_second": peak, "hfu": rate / peak}


def product_rate(dtype: torch.dtype, device: torch.device) -> float:
    """FLOPs per second of square matrix products, the best of five."""
    size = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        left @ right
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
