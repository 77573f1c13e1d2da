"""Plot of the attention benchmark: time and extra memory by sequence length, one line per method."""

from longqlora.plot import mark_lengths, new_figure

PANELS = {"median_seconds": ("median time (ms)", 1e3), "extra_bytes": ("extra memory (MiB)", 2**-20)}


def plot_attention(results: dict[str, dict], path: str) -> None:
    """results: length -> method -> figures, as benchmark/attention.py measures them; missing points are left out."""
    lengths = sorted(map(int, results))
    methods = dict.fromkeys(name for figures in results.values() for name in figures)
    with new_figure(path, len(PANELS)) as axes:
        for axis, (key, (label, factor)) in zip(axes, PANELS.items(), strict=True):
            for name in methods:
                found = [(n, results[str(n)].get(name, {}).get(key)) for n in lengths]
                points = [(n, value * factor) for n, value in found if value is not None]
                axis.plot([n for n, _ in points], [value for _, value in points], marker="o", label=name)
            mark_lengths(axis, lengths)
            axis.set_yscale("log")
            axis.set(xlabel="tokens", ylabel=f"{label}, forward + backward")
            axis.legend()
