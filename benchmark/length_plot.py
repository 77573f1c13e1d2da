"""Plot of an attention benchmark: time beside extra memory by sequence length, one line per method."""

from longqlora.plot import mark_lengths, new_figure


def plot_by_length(results: dict[str, dict], path: str, panels: dict[str, tuple[str, float]], *, log: set[str]) -> None:
    """results: length -> method -> figures, of which missing ones are left out.

    panels: figure -> (label of its axis, factor); log: the figures whose axis is logarithmic, others begin at 0.
    """
    lengths = sorted(map(int, results))
    methods = dict.fromkeys(name for figures in results.values() for name in figures)
    with new_figure(path, len(panels)) as axes:
        for axis, (key, (label, factor)) in zip(axes, panels.items(), strict=True):
            for name in methods:
                known = [n for n in lengths if key in results[str(n)].get(name, {})]
                axis.plot(known, [results[str(n)][name][key] * factor for n in known], label=name)
            mark_lengths(axis, lengths)
            if key in log:
                axis.set_yscale("log")
            else:
                axis.set_ylim(bottom=0)
            axis.set(xlabel="tokens", ylabel=label)
            axis.legend()
