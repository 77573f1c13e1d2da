"""Plot of the benchmark of dual chunk attention: time and extra memory by length, one line per method."""

from longqlora.plot import mark_lengths, new_figure

LABELS = {
    "min_seconds": "forward time (s)",
    "min_cpu_seconds": "forward time on the CPU (s)",
    "extra_per_qkv": "extra memory (times q + k + v)",
}


def plot_dual_chunk_attention(results: dict[str, dict], path: str, *, key: str = "min_seconds") -> None:
    """Time by `key` beside memory; results: length -> {"methods": name -> figures}, as measured."""
    panels, lengths = (key, "extra_per_qkv"), sorted(map(int, results))
    methods = dict.fromkeys(name for result in results.values() for name in result["methods"])
    with new_figure(path, len(panels)) as axes:
        for axis, panel in zip(axes, panels, strict=True):
            for name in methods:
                found = [(n, results[str(n)]["methods"].get(name, {}).get(panel)) for n in lengths]
                points = [(n, value) for n, value in found if value is not None]
                axis.plot([n for n, _ in points], [value for _, value in points], marker="o", label=name)
            mark_lengths(axis, lengths)
            if panel == key:
                axis.set_yscale("log")
            else:
                axis.set_ylim(bottom=0)
            axis.set(xlabel="tokens", ylabel=LABELS[panel])
            axis.legend()
