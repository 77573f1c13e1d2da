"""Plot of an attention benchmark: time beside extra memory by sequence length, one line per method."""

from longqlora.plot import new_figure, save_figure


def plot_by_length(results: dict[str, dict], path: str, panels: dict[str, tuple[str, float]], *, log: set[str]) -> None:
    """results: length -> method -> figures, of which missing ones are left out.

    panels: figure -> (label of its axis, factor); log: the figures whose axis is logarithmic, others begin at 0.
    """
    figure, axes = new_figure(len(panels))
    lengths = sorted(map(int, results))
    methods = dict.fromkeys(name for figures in results.values() for name in figures)
    for axis, (key, (label, factor)) in zip(axes, panels.items(), strict=True):
        for name in methods:
            points = [(n, results[str(n)][name][key] * factor) for n in lengths if key in results[str(n)].get(name, {})]
            axis.plot([n for n, _ in points], [value for _, value in points], marker="o", label=name)
        axis.set_xscale("log", base=2)
        axis.set_xticks(lengths, [str(n) for n in lengths])
        if key in log:
            axis.set_yscale("log")
        else:
            axis.set_ylim(bottom=0)
        axis.minorticks_off()
        axis.set_xlabel("tokens")
        axis.set_ylabel(label)
        axis.legend()
    save_figure(figure, path)
