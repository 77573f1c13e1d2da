"""The memory plan as a table: activation policies against lengths."""

import copy

from transformers import PretrainedConfig

from longqlora.device import GIB
from longqlora.memory.estimate import predict
from longqlora.memory.plan import AUTO_SHARE, candidates_of, longest_length, run_shape, yaml_lines
from longqlora.memory.policy import STOCK_CANDIDATES, ActivationPolicy
from longqlora.memory.shapes import ModelShape
from longqlora.settings.reader import Settings


def memory_table(settings: Settings, config: PretrainedConfig, lengths: list[int], capacity: float) -> dict:
    """JSON-ready: for each set its predicted GiB by length, the longest length, host GiB there, relative time;
    and for each length the settings of the fastest set that fits (None where none does)."""
    candidates, reason = candidates_of(settings, config)
    sets = [*STOCK_CANDIDATES, *(candidates if reason is None else ())]
    rows, shape = [], ModelShape.of(config)
    for policy in sets:
        longest = longest_length(settings, config, policy, capacity)
        estimates = {length: estimate_at(settings, shape, policy, length) for length in lengths}
        rows.append(
            {
                "mechanisms": policy.describe(),
                "settings": yaml_lines(policy).splitlines(),
                "peak_gib": {str(length): estimate.peak / GIB for length, estimate in estimates.items()},
                "longest": longest,
                "host_gib": estimate_at(settings, shape, policy, max(longest, 2)).host / GIB,
                "relative_time": next(iter(estimates.values())).relative_time,
            }
        )
    by_time = sorted(rows, key=lambda row: row["relative_time"])
    room = AUTO_SHARE * capacity / GIB
    fastest = {
        str(length): next((row["settings"] for row in by_time if row["peak_gib"][str(length)] <= room), None)
        for length in lengths
    }
    return {"capacity_gib": capacity / GIB, "sets": rows, "fastest": fastest, "reason": reason}


def estimate_at(settings: Settings, shape: ModelShape, policy: ActivationPolicy, length: int):
    """The prediction for rows of `length` tokens."""
    changed = copy.copy(settings)
    changed.data = copy.copy(settings.data)
    changed.data.max_seq_length = length
    return predict(shape, run_shape(changed, policy), policy)


def format_table(table: dict) -> str:
    lengths = list(table["fastest"])
    width = max(len(row["mechanisms"]) for row in table["sets"])
    head = "".join(f"{length:>10}" for length in lengths)
    lines = [f"{'set':<{width}}{head}   longest  host GiB    time"]
    for row in table["sets"]:
        peaks = "".join(f"{row['peak_gib'][length]:>10.1f}" for length in lengths)
        lines.append(
            f"{row['mechanisms']:<{width}}{peaks}{row['longest']:>10}{row['host_gib']:>10.1f}"
            f"{row['relative_time']:>8.2f}"
        )
    if table["reason"]:
        lines.append(f"the layer function is not available, since {table['reason']}")
    for length, settings in table["fastest"].items():
        asked = "; ".join(settings) if settings else "nothing fits"
        lines.append(f"{length} tokens: {asked}")
    return "\n".join(lines)
