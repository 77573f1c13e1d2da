"""Plots of methods: every curve has a look of its own, and the original length is marked where it was reached."""

import math

import pytest
from matplotlib.figure import Figure

from longqlora.plot import draw_loss_by_position, draw_perplexity, new_figure

NAMES = [f"method {number}" for number in range(10)]


def blocks(length: int) -> list[dict]:
    return [{"start": start, "end": start + 64, "loss": 2.0} for start in range(0, length, 64)]


@pytest.fixture
def drawn(tmp_path):
    """Two panels of every method to 1024 tokens, with the original length and one method in a thin line."""
    style = {"original_length": 256, "thin": NAMES[:1]}
    with new_figure(tmp_path / "x.png", 2) as axes:
        points = [(256, 8.0), (512, 9.0), (1024, 500.0), (2048, math.inf), (4096, None)]
        draw_perplexity(axes[0], dict.fromkeys(NAMES, points), **style)
        draw_loss_by_position(axes[1], dict.fromkeys(NAMES, blocks(1024)), **style)
    assert (tmp_path / "x.png").stat().st_size
    return axes


def test_curves_are_told_apart_by_more_than_colour(drawn):
    for axis in drawn:
        lines = axis.lines[: len(NAMES)]
        assert len({(line.get_marker(), line.get_linestyle()) for line in lines}) == len(NAMES)
        assert len({line.get_color() for line in lines[:7]}) == 7
        assert lines[0].get_linewidth() < lines[1].get_linewidth()


def test_the_original_length_is_marked(drawn):
    assert drawn[0].get_yscale() == "log" and drawn[1].get_yscale() == "linear"
    for axis in drawn:
        mark = axis.lines[len(NAMES)]
        assert list(mark.get_xdata()) == [256, 256] and mark.get_label() == "original length (256)"
        assert mark.get_linestyle() == ":" and len(axis.lines) == len(NAMES) + 1


@pytest.mark.parametrize("original_length", [None, 4096])
def test_a_length_that_is_unknown_or_not_reached_is_not_marked(original_length):
    axis = Figure().subplots()
    draw_loss_by_position(axis, {"base": blocks(1024)}, original_length=original_length)
    assert len(axis.lines) == 1
