"""Table 1 and Fig. 1a: what task=rounding measured, beside the closed forms."""

from __future__ import annotations

from collections.abc import Sequence

from luqrun.report.figures import pyplot
from luqrun.report.layout import TITLES
from luqrun.report.records import Record

NAMES = ("table1", "fig1a")
ROUNDINGS = {"nearest": "RDN", "stochastic": "SR", "flush": "pruned"}
HEADER = ("rounding", "format", "bin", "largest bias", "largest variance", "mean MSE", "largest z of the bias")


def of_table(records: Sequence[Record], name: str) -> list[Record]:
    """The records of one of NAMES."""
    return [record for record in records if record.table == name and record.rounding]


def lines(records: Sequence[Record]) -> list[tuple[str, ...]]:
    """A line for each bin, in the order of HEADER: measured, and in brackets the closed form."""
    found = {}
    for record in records:
        for row in record.rounding:
            low, high = row["bin"]
            pairs = [
                f"{of(row['measured'][name]):.4g} ({of(row['closed_form'][name]):.4g})"
                for name, of in (("bias", max), ("variance", max), ("mse", _mean))
            ]
            form = row["quantizer"].split("/")[0]
            key = ROUNDINGS[row["drawn"]], form, f"[{low}, {high}]"  # weights and activations are rounded alike
            found.setdefault(key, (*key, *pairs, f"{row['z']:.2f}"))
    return [found[key] for key in sorted(found)]


def draw(records: Sequence[Record]):
    """Fig. 1a: mean squared error over [0, 1], in the lowest bin of an integer format; None without such a run."""
    rows = {row["drawn"]: row for each in records for row in each.rounding if row["bin"] == [0, 1] and _integer(row)}
    if not rows:
        return None
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(6.4, 4.2))
    for name, row in sorted(rows.items()):
        (line,) = axes.plot(row["x"], row["closed_form"]["mse"], label=f"{ROUNDINGS[name]}, closed form")
        style = {"linestyle": "none", "marker": "o", "markersize": 3, "color": line.get_color()}
        axes.plot(row["x"], row["measured"]["mse"], label=f"{ROUNDINGS[name]}, measured", **style)
    axes.set(xlabel="x", ylabel="mean squared error", title=TITLES["fig1a"])
    axes.legend(frameon=False)
    return figure


def _integer(row: dict) -> bool:
    return row["quantizer"].startswith("int")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
