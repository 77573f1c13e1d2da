"""Plot of the benchmark of dual chunk attention: time and extra memory by length, one line per method."""

from pathlib import Path

from longqlora.files import atomic_file

LABELS = {
    "min_seconds": "forward time (s)",
    "min_cpu_seconds": "forward time on the CPU (s)",
    "extra_per_qkv": "extra memory (times q + k + v)",
}


def plot_dual_chunk_attention(results: dict[str, dict], path: str, *, key: str = "min_seconds") -> None:
    """Time by `key` beside memory; results: length -> {"methods": name -> figures}, as measured."""
    from matplotlib.figure import Figure

    panels = (key, "extra_per_qkv")
    figure = Figure(figsize=(6.4 * len(panels), 4.2), dpi=120, layout="constrained")
    lengths = sorted(map(int, results))
    methods = dict.fromkeys(name for result in results.values() for name in result["methods"])
    for axis, panel in zip(figure.subplots(1, len(panels)), panels, strict=True):
        for name in methods:
            found = [(n, results[str(n)]["methods"].get(name, {}).get(panel)) for n in lengths]
            points = [(n, value) for n, value in found if value is not None]
            axis.plot([n for n, _ in points], [value for _, value in points], marker="o", label=name)
        axis.set_xscale("log", base=2)
        axis.set_xticks(lengths, [str(n) for n in lengths])
        axis.minorticks_off()
        if panel == key:
            axis.set_yscale("log")
        else:
            axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.set_xlabel("tokens")
        axis.set_ylabel(LABELS[panel])
        axis.legend()
    with atomic_file(path, "wb") as file:
        figure.savefig(file, format=Path(path).suffix.lstrip(".").lower())
