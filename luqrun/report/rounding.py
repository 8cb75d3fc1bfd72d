"""Table 1 and Fig. 1a: what job=rounding measured, beside the closed forms."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean

from luqrun.report.claims import CONFIDENCE, CONTRADICTED, HOLDS, MISSING, NOT_CONTRADICTED, Claim, Finding
from luqrun.report.experiments import ROUNDING_TABLES, TITLES, expected
from luqrun.report.figures import pyplot
from luqrun.report.records import LeftOut, Record
from luqrun.report.tables import build_table

ROUNDINGS = {"nearest": "RDN", "stochastic": "SR", "flush": "pruned"}
HEADER = ("rounding", "format", "bin", "largest bias", "largest variance", "mean MSE", "largest z of the bias")
CLOSED = "rounding to nearest has the bias, the variance and the MSE of its closed forms"
NEVER_BELOW = "the MSE of stochastic rounding is nowhere below that of rounding to nearest"
UNBIASED = "stochastic rounding is unbiased"


@dataclass(frozen=True)
class RoundingTable:
    """One of ROUNDING_TABLES as a study measured it: a record a recipe, and the commands of `missing` more runs."""

    study: str
    name: str
    records: tuple[Record, ...]
    missing: int
    commands: tuple[str, ...]

    @property
    def title(self) -> str:
        return f"{TITLES[self.name]} ({self.study})"

    def rows(self, drawn: str | None = None) -> list[dict]:
        """What rounding_experiment measured, each once (recipes share quantizers); of Fig. 1a what its title says."""
        found = {}
        for row in (row for record in self.records for row in record.rounding):
            if (self.name != "fig1a" or _of_figure(row)) and drawn in (None, row["drawn"]):
                found.setdefault((row["operand"], *_place(row), tuple(row["measured"]["mse"])), row)
        return list(found.values())

    def lines(self) -> list[tuple[str, ...]]:
        """A line for each bin, in the order of HEADER: measured, and in brackets the closed form.

        Weights and activations of one format are rounded alike: a line is about both.
        """
        places: dict[tuple, list[dict]] = {}
        for row in self.rows():
            places.setdefault(_place(row), []).append(row)
        found = []
        for (rounding, form, low, high), rows in sorted(places.items()):
            pairs = [
                " ".join((f"{_all(rows, 'measured', name, of):.4g}", f"({_all(rows, 'closed_form', name, of):.4g})"))
                for name, of in (("bias", max), ("variance", max), ("mse", fmean))
            ]
            found.append((rounding, form, f"[{low}, {high}]", *pairs, f"{max(row['z'] for row in rows):.2f}"))
        return found


def build_rounding_tables(
    records: Sequence[Record], wanted: Sequence[str] = ()
) -> tuple[list[RoundingTable], list[LeftOut]]:
    """What each study measured of ROUNDING_TABLES, and the records that it does not show.

    wanted: of these names only. Where there is one of them, the other is there too, if only with its command.
    """
    studies: dict[tuple[str, str, str], dict[tuple[str, str], list[Record]]] = {}
    for record in sorted((each for each in records if each.rounding), key=lambda each: each.seed):
        if record.table in ROUNDING_TABLES:
            study = studies.setdefault((record.study, record.table, record.scale or ""), {})
            study.setdefault((record.row, record.column), []).append(record)
    found, left_out = [], []
    for (study, name, scale), cells in sorted(studies.items()):
        shown = [first for first, *_ in cells.values()]
        for first, *others in cells.values():
            reason = f"measured again: {first.path.name} is shown, of seed {first.seed}"
            left_out += [LeftOut(other.path, reason) for other in others]
        missing = [cell for cell in build_table(study, name, scale, shown).cells.values() if not cell.runs]
        commands = tuple(command for cell in missing for command in cell.commands())
        found.append(RoundingTable(study, name, tuple(shown), sum(len(cell.missing) for cell in missing), commands))
    there = {each.name for each in found}
    for name in ROUNDING_TABLES if found else ():
        if name not in there:
            parent = found[0].study.rpartition("/")[0]
            command = f"luqrun -m +experiment={name}/measured"
            count = len(expected(name, "measured"))
            found.append(RoundingTable(f"{parent}/{name}".lstrip("/"), name, (), count, (command,)))
    found.sort(key=lambda each: (ROUNDING_TABLES.index(each.name), each.study))
    return [each for each in found if not wanted or each.name in wanted], left_out


def draw(table: RoundingTable):
    """Fig. 1a: mean squared error over [0, 1], in the lowest bin of an integer format; None for another table."""
    if table.name != "fig1a" or not table.rows():
        return None
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(6.4, 4.2))
    for drawn in sorted({row["drawn"] for row in table.rows()}):
        first, *others = table.rows(drawn)
        (line,) = axes.plot(first["x"], first["closed_form"]["mse"], label=f"{ROUNDINGS[drawn]}, closed form")
        style = {"linestyle": "none", "marker": "o", "markersize": 3, "color": line.get_color()}
        axes.plot(first["x"], first["measured"]["mse"], label=f"{ROUNDINGS[drawn]}, measured", **style)
        for row in others:
            axes.plot(row["x"], row["measured"]["mse"], **style)
    axes.set(xlabel="x", ylabel="mean squared error", title=TITLES["fig1a"])
    axes.legend(frameon=False)
    return figure


def check_rounding(tables: Iterable[RoundingTable]) -> list[Finding]:
    """Three findings for each table: RDN as its closed forms, SR's MSE never below RDN's, SR without bias."""
    return [
        Finding(table.study, Claim(table.name, text, {}), None, verdict, note=note)
        for table in tables
        for text, (verdict, note) in (
            (CLOSED, _closed(table)),
            (NEVER_BELOW, _never_below(table)),
            (UNBIASED, _unbiased(table)),
        )
    ]


def _closed(table: RoundingTable) -> tuple[str, str]:
    rows = table.rows("nearest")
    pairs = [
        pair
        for row in rows
        for name in ("bias", "variance", "mse")
        for pair in zip(row["measured"][name], row["closed_form"][name], strict=True)
    ]
    same = all(_equal(*pair) for pair in pairs)
    return (HOLDS if same else CONTRADICTED) if rows else MISSING, f"points: {_points(rows)}" if rows else ""


def _never_below(table: RoundingTable) -> tuple[str, str]:
    pairs = [
        (mine, theirs)
        for row in table.rows("stochastic")
        for other in table.rows("nearest")
        if _place(row)[1:] == _place(other)[1:] and row["x"] == other["x"]
        for mine, theirs in zip(row["measured"]["mse"], other["measured"]["mse"], strict=True)
    ]
    if not pairs:
        return MISSING, ""
    below = sum(mine < theirs and not _equal(mine, theirs) for mine, theirs in pairs)
    return CONTRADICTED if below else HOLDS, f"below in {below} of {len(pairs)} comparisons"


def _unbiased(table: RoundingTable) -> tuple[str, str]:
    """By the largest of many z, whose bound has a chance of 5 % to be passed by any of as many (Bonferroni)."""
    rows = table.rows("stochastic")
    count = sum(variance > 0 for row in rows for variance in row["closed_form"]["variance"])
    if not count:
        return MISSING, ""
    bound = NormalDist().inv_cdf(1 - (1 - CONFIDENCE) / (2 * count))
    largest = max(row["z"] for row in rows)
    note = f"largest |z| of the bias {largest:.2f}, bound {bound:.2f} for {count} points with {CONFIDENCE:.0%} in all"
    return NOT_CONTRADICTED if largest < bound else CONTRADICTED, note


def _place(row: dict) -> tuple:
    """What is rounded alike: rounding, format, and the bin's ends."""
    return ROUNDINGS[row["drawn"]], row["quantizer"].split("/")[0], *row["bin"]


def _of_figure(row: dict) -> bool:
    return row["bin"] == [0, 1] and row["quantizer"].startswith("int")


def _all(rows: Sequence[dict], part: str, name: str, of) -> float:
    return of([value for row in rows for value in row[part][name]])


def _points(rows: Sequence[dict]) -> int:
    return sum(len(row["x"]) for row in rows)


def _equal(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=1e-6, abs_tol=1e-8)  # written with nine digits after the point
