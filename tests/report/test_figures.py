"""Figures from runs: what they draw, and that they are written alike twice."""

import sys
from dataclasses import replace

import pytest
from report_runs import DIVERGED, a_table, hide

from luqrun.errors import UserError
from luqrun.report import figures

SCOPES = ("averaged for wgrad", "averaged for wgrad and dgrad")


@pytest.fixture(scope="module")
def plt():
    pytest.importorskip("matplotlib")
    return figures.pyplot()


@pytest.fixture(autouse=True)
def _close():
    yield
    if "matplotlib.pyplot" in sys.modules:
        figures.pyplot().close("all")


def drawn(table):
    figure = figures.draw(table)
    (axes,) = figure.axes
    return axes


def labels(axes) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    hide(monkeypatch, "matplotlib")
    with pytest.raises(UserError, match=r"pip install 'luqrun\[plot\]'"):
        figures.pyplot()


def test_tables_of_numbers_have_no_figure(monkeypatch):
    hide(monkeypatch, "matplotlib")
    for name in ("table2", "table3", "table6"):
        assert figures.draw(a_table(name, {("resnet8", "fp32"): [80.0]})) is None


def test_curves_are_means_with_bands(plt):
    records = {0: (10.0, 20.0, 80.0), 1: (14.0, 30.0, 84.0)}
    table = a_table("fig2", {"fp32": {}, "luq": {}} | {"fp32": [80.0]}, curve=(4.0, 30.5, 80.0))
    for seed, curve in records.items():
        (run,) = a_table("fig2", {"luq": {seed: curve[-1]}}, curve=curve).cells["luq", "top1"].runs.values()
        table.cells["luq", "top1"].runs[seed] = run
    axes = drawn(table)
    single, mean = axes.lines
    assert list(single.get_xdata()) == [1, 2, 3]
    assert list(single.get_ydata()) == [4.0, 30.5, 80.0]
    assert list(mean.get_ydata()) == [12.0, 25.0, 82.0]
    assert "diverged" not in axes.get_legend().get_title().get_text()
    (band,) = axes.collections  # of the two seeds; one has none
    low, high = band.get_paths()[0].get_extents().get_points()[:, 1]
    assert (low, high) == pytest.approx((12 - 8**0.5, 82 + 8**0.5))
    assert labels(axes) == ["fp32 (1)", "luq (2)"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("epoch", "validation top-1 %")


def test_curves_of_unequal_length_end_with_the_shortest(plt):
    table = a_table("fig2", {"luq": {0: 30.0}}, curve=(10.0, 20.0, 30.0))
    (run,) = a_table("fig2", {"luq": {1: 40.0}}, curve=(20.0, 40.0)).cells["luq", "top1"].runs.values()
    table.cells["luq", "top1"].runs[1] = run
    (line,) = drawn(table).lines
    assert list(line.get_ydata()) == [15.0, 30.0]


def test_what_diverged_is_in_the_legend(plt):
    axes = drawn(a_table("fig2", {"fp32": [80.0], "luq": [79.0, DIVERGED], "uniform_sr": [DIVERGED] * 2}))
    assert labels(axes) == ["fp32 (1)", "uniform_sr: all 2 diverged", "luq (1), 1 diverged"]
    assert [len(line.get_xdata()) for line in axes.lines] == [3, 0, 3]


def test_the_curve_of_a_diverged_run_is_shown_up_to_there(plt):
    values = {"fp32": [80.0, 82.0], "luq": [79.0, DIVERGED], "uniform_sr": [DIVERGED]}
    table = a_table("fig2", values)
    curves = {("luq", 1): (3.0, 5.0), ("uniform_sr", 0): (2.0,)}
    for (row, seed), curve in curves.items():
        runs = table.cells[row, "top1"].runs
        runs[seed] = replace(runs[seed], curve=curve)
    axes = drawn(table)
    ended = {tuple(line.get_ydata()): line for line in axes.lines if line.get_marker() == "x" and line.get_xdata().size}
    assert set(ended) == set(curves.values())
    assert all(line.get_markevery() == [len(curve) - 1] for curve, line in ended.items())
    (mean,) = (line for line in axes.lines if line.get_label() == "luq (1), 1 diverged")
    assert list(mean.get_ydata()) == [4.0, 30.5, 79.0]  # not of the diverged
    assert mean.get_color() == ended[3.0, 5.0].get_color()
    assert labels(axes) == ["fp32 (2)", "uniform_sr: all 1 diverged", "luq (1), 1 diverged"]
    assert axes.get_legend().get_title().get_text().endswith("x: diverged after it")
    assert len({line.get_color() for line in axes.lines}) == 3


@pytest.mark.parametrize("name", ["fig1b", "fig1c", "fig2", "options", "fig5"])
def test_every_figure_of_a_study_is_drawn(plt, name):
    rows = {"fig1c": "backward_only", "fig5": "fp2_both4", "fig1b": "forward_only"}
    axes = drawn(a_table(name, {rows.get(name, "luq"): [80.0, 81.0]}))
    assert axes.get_title().endswith(f"(embedded/{name})")
    assert len(labels(axes)) == 1


@pytest.mark.parametrize("name", ["fig2", "fig5"])
def test_without_a_number_there_is_no_figure(plt, name):
    row = {"fig2": "luq", "fig5": "fp2_smp2"}[name]
    assert figures.draw(a_table(name, {row: [DIVERGED]})) is None
    assert plt.get_fignums() == []


def test_accuracy_against_samples(plt):
    values = {
        "forward_only": [81.0, 82.0],
        "fp2_smp1": [30.0, 32.0],
        "fp2_both2": [50.0],
        "fp2_smp16": [40.0, DIVERGED],
        "luq": [1.0],  # not of this figure
    }
    axes = drawn(a_table("fig5", values))
    found = dict(zip((container.get_label() for container in axes.containers), axes.containers, strict=True))
    assert set(found) == set(SCOPES)
    points = {name: [tuple(each) for each in container[0].get_xydata()] for name, container in found.items()}
    assert points == {SCOPES[0]: [(1, 31.0), (16, 40.0)], SCOPES[1]: [(1, 31.0), (2, 50.0)]}  # one sample is in both
    assert labels(axes)[0] == "full-precision gradients (81.5)"
    assert [text.get_text() for text in axes.get_xticklabels()] == ["1", "2", "16"]
    level = [line for line in axes.lines if line.get_linestyle() == "--"]
    assert [list(line.get_ydata()) for line in level] == [[81.5, 81.5]]


def test_png_and_svg_are_written_and_the_svg_is_the_same_again(plt, tmp_path):
    written = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        table = a_table("fig2", {"fp32": [80.0, 81.0], "luq": [79.0, 78.0]})
        written.append(figures.save(figures.draw(table), tmp_path / name, "picture"))
    assert [path.name for path in written[0]] == ["picture.png", "picture.svg"]
    assert written[0][0].read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert written[0][1].read_text().rstrip().endswith("</svg>")
    assert written[0][1].read_bytes() == written[1][1].read_bytes()
    assert plt.get_fignums() == []
