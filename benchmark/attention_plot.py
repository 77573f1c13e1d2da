"""Plot of the attention benchmark: time and extra memory by sequence length, one line per method."""

from pathlib import Path

from longqlora.files import atomic_file

PANELS = {"median_seconds": ("median time (ms)", 1e3), "extra_bytes": ("extra memory (MiB)", 2**-20)}


def plot_attention(results: dict[str, dict], path: str) -> None:
    """results: length -> method -> figures, as benchmark/attention.py measures them; missing points are left out."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4 * len(PANELS), 4.2), dpi=120, layout="constrained")
    lengths = sorted(map(int, results))
    methods = dict.fromkeys(name for figures in results.values() for name in figures)
    for axis, (key, (label, factor)) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        for name in methods:
            points = [(n, results[str(n)][name][key] * factor) for n in lengths if key in results[str(n)].get(name, {})]
            axis.plot([n for n, _ in points], [value for _, value in points], marker="o", label=name)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(lengths, [str(n) for n in lengths])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.set_xlabel("tokens")
        axis.set_ylabel(f"{label}, forward + backward")
        axis.legend()
    with atomic_file(path, "wb") as file:
        figure.savefig(file, format=Path(path).suffix.lstrip(".").lower())
