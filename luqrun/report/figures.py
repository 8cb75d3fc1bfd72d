"""The paper's figures from our runs: curves with bands, and accuracy against samples."""

from __future__ import annotations

import re
from pathlib import Path
from statistics import fmean, stdev

from luqrun.errors import UserError
from luqrun.report.experiments import BASELINES
from luqrun.report.tables import Table
from luqrun.runs.metric import Metric

CURVES = ("fig1b", "fig1c", "fig2", "options")
DIVERGED = "diverged"  # the id of a line
LINES = ("-", "--", "-.", ":")


def pyplot():
    """matplotlib without a window; UserError where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("figures need matplotlib: pip install 'luqrun[plot]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    looks = {"axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "luqrun"}
    plt.rcParams.update({**looks, "text.parse_math": False})  # a dollar in a name is a dollar
    return plt


def draw(table: Table):
    """The figure of a table, or None where it has none (or no runs yet)."""
    if table.name in CURVES:
        return _curves(table)
    if table.name == "fig5":
        return _samples(table)
    return None


def save(figure, folder: Path, name: str) -> list[Path]:
    """As PNG and SVG, in the folder."""
    paths = [folder / f"{name}.{ending}" for ending in ("png", "svg")]
    for path in paths:
        figure.savefig(path, dpi=150, bbox_inches="tight", metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot().close(figure)
    return paths


def _curves(table: Table):
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(6.4, 4.2))
    for number, cell in enumerate(table.cells.values()):
        style, color = LINES[number % len(LINES)], f"C{number % 10}"
        for run in cell.runs.values():
            if run.diverged and run.curve:
                _until_divergence(axes, run.curve, style, color)
        curves = [run.curve for run in cell.runs.values() if run.curve and not run.diverged]
        if not curves:
            if cell.diverged:
                marked = any(run.curve for run in cell.runs.values())
                look = {"linestyle": style, "marker": "x", "color": color} if marked else {"linestyle": " "}
                axes.plot([], [], label=f"{cell.row}: all {cell.diverged} diverged", **look)
            continue
        epochs = range(1, min(len(curve) for curve in curves) + 1)
        columns = [[curve[epoch - 1] for curve in curves] for epoch in epochs]
        means = [fmean(values) for values in columns]
        label = f"{cell.row} ({len(curves)})" + (f", {cell.diverged} diverged" if cell.diverged else "")
        axes.plot(epochs, means, style, color=color, label=label, marker="o", markersize=3)
        if len(curves) > 1:
            spreads = [stdev(values) for values in columns]
            low, high = ([m + sign * s for m, s in zip(means, spreads, strict=True)] for sign in (-1, 1))
            axes.fill_between(epochs, low, high, color=color, alpha=0.15, linewidth=0)
    if not any(len(line.get_xdata()) for line in axes.lines):
        plt.close(figure)
        return None
    axes.xaxis.get_major_locator().set_params(integer=True)
    labels = dict.fromkeys(run.curve_metric.label for run in table.runs)
    axes.set(xlabel="epoch", ylabel=f"validation {' or '.join(labels)}", title=table.title)
    # Beside the curves: recipes that fail for a while leave no room among them.
    place = {"loc": "upper left", "bbox_to_anchor": (1, 1), "frameon": False}
    ended = "\nx: diverged after it" if any(line.get_gid() == DIVERGED for line in axes.lines) else ""
    axes.legend(title=f"recipe (seeds);\nband: 1 standard deviation{ended}", fontsize=8, title_fontsize=8, **place)
    return figure


def _until_divergence(axes, curve: tuple[float, ...], style: str, color: str) -> None:
    """A run of its own, thin, with a cross at its last epoch."""
    epochs, last = range(1, len(curve) + 1), [len(curve) - 1]
    axes.plot(epochs, curve, style, color=color, linewidth=0.8, marker="x", markevery=last, gid=DIVERGED)


def _with_split(metric: Metric) -> str:
    """Such as "validation top-1 %"; a metric on test data says so itself."""
    return metric.label if metric.name.startswith("test/") else f"validation {metric.label}"


def _samples(table: Table):
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(6.4, 4.2))
    points: dict[str, list] = {"wgrad": [], "wgrad and dgrad": []}
    for cell in table.cells.values():
        values = list(cell.values.values())
        if not values:
            continue
        name = re.fullmatch(r"fp2_(smp|both)(\d+)", cell.row)
        if name is None:
            if cell.row != BASELINES["fig5"][0]:
                continue
            mean = fmean(values)
            axes.axhline(
                mean, color="black", linestyle="--", linewidth=1, label=f"full-precision gradients ({mean:.1f})"
            )
            continue
        point = int(name[2]), fmean(values), stdev(values) if values[1:] else 0.0
        for scope in points if point[0] == 1 else ["wgrad" if name[1] == "smp" else "wgrad and dgrad"]:
            points[scope].append(point)  # a single sample is the same in both
    for scope, found in points.items():
        if found:
            axes.errorbar(*zip(*sorted(found), strict=True), marker="o", capsize=3, label=f"averaged for {scope}")
    if not axes.containers:
        plt.close(figure)
        return None
    samples = sorted({count for found in points.values() for count, *_ in found})
    axes.set_xscale("log", base=2)
    axes.set_xticks(samples, [str(count) for count in samples])
    axes.set(
        xlabel="samples of 2-bit gradients; bars: 1 standard deviation",
        ylabel=" or ".join(_with_split(metric) for metric in table.metrics),
        title=table.title,
    )
    axes.legend(fontsize=8, frameon=False)
    return figure
