"""The orderings that the paper claims, tested on our numbers seed by seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from luqrun.report.spread import Spread, bounds
from luqrun.report.tables import Table

CONFIDENCE = 0.95
HOLDS, NOT_SHOWN, CONTRADICTED, MISSING = "holds", "not shown", "contradicted", "runs are missing"


@dataclass(frozen=True)
class Claim:
    """A weighted sum of cells is above a margin, in points of top-1.

    cells: (row or None for each row, column) to weight. strict: it must be above with confidence; else it holds
    unless it is below with confidence ("not worse beyond noise").
    """

    table: str
    text: str
    cells: dict[tuple[str | None, str], float]
    margin: float = 0.0
    strict: bool = True


def _above(table: str, text: str, better: str, worse: str, **more) -> Claim:
    """Of tables whose rows are recipes."""
    return Claim(table, text, {(better, "top1"): 1.0, (worse, "top1"): -1.0}, **more)


def _beside(table: str, text: str, better: str, worse: str, **more) -> Claim:
    """Of tables whose columns are recipes: in each row."""
    return Claim(table, text, {(None, better): 1.0, (None, worse): -1.0}, **more)


def _samples() -> list[Claim]:
    """Of samples that are averaged for both GEMMs, as in the paper's reference code."""
    names = {1: "fp2_smp1", **{count: f"fp2_both{count}" for count in (2, 4, 8, 16)}}
    more = [
        _above("fig5", f"{b} samples are not worse than {a}", names[b], names[a], strict=False)
        for a, b in pairwise(names)
    ]
    near = "16 samples come within 1 point of full-precision gradients"
    return [*more, _above("fig5", near, names[16], "forward_only", margin=-1.0)]


CLAIMS = (
    _above("fig2", "fp32 is above LUQ", "fp32", "luq"),
    _above("fig2", "LUQ is above uniform SR", "luq", "uniform_sr"),
    _above("fig2", "LUQ is above biased FP4", "luq", "biased_log"),
    _above("fig2", "LUQ is above FP4 + SR", "luq", "fp4_sr"),
    _above("fig2", "LUQ is above FP4 + SU", "luq", "fp4_su"),
    _above("fig1b", "in the forward quantizer RDN is above SR", "forward_only", "forward_sr"),
    _above("fig1c", "in the gradient quantizer SR is above RDN", "backward_only", "backward_nearest"),
    _beside("table2", "fp32 is above LUQ + SMP", "fp32", "luq_smp2"),
    _beside("table2", "LUQ + SMP is not worse than LUQ", "luq_smp2", "luq", strict=False),
    _beside("table3", "fp32 is above LUQ + SMP", "fp32_none", "luq_smp2_none"),
    Claim(
        "table3",
        "three epochs of FNT recover at least half of the loss of LUQ + SMP",
        {(None, "luq_smp2_fnt3"): 1.0, (None, "luq_smp2_none"): -0.5, (None, "fp32_none"): -0.5},
    ),
    _beside("table6", "4-bit gradients cost more than a 4-bit forward", "forward_only", "backward_only"),
    *_samples(),
    _above("options", "hindsight costs at most 1 point", "luq_hindsight", "luq", margin=-1.0),
    _above("options", "power-of-two scales cost at most 1 point", "luq_pow2", "luq", margin=-1.0),
)


@dataclass(frozen=True)
class Finding:
    """What our numbers say of a claim. spread: of the sum less the margin, over seeds; low, high: its bounds."""

    study: str
    claim: Claim
    row: str | None
    verdict: str
    spread: Spread | None = None
    low: float | None = None
    high: float | None = None

    def __str__(self):
        where = f"{self.study}" + (f", {self.row}" if self.row else "")
        if self.spread is None:
            return f"{where}: {self.claim.text}: {self.verdict}"
        margin = f" of the margin {self.claim.margin:g}" if self.claim.margin else ""
        return (
            f"{where}: {self.claim.text}: {self.verdict} ({self.spread.mean:+.2f} points{margin}, "
            f"seeds: {self.spread.count}, {CONFIDENCE:.0%} bounds {self.low:+.2f} and {self.high:+.2f})"
        )


def check_claims(tables: Sequence[Table]) -> list[Finding]:
    """A finding for each claim about these tables."""
    return [
        _test(table, claim, row)
        for table in tables
        for claim in CLAIMS
        if claim.table == table.name
        for row in (table.rows if any(row is None for row, _ in claim.cells) else [None])
    ]


def _test(table: Table, claim: Claim, row: str | None) -> Finding:
    cells = [(table.cells.get((own or row, column)), weight) for (own, column), weight in claim.cells.items()]
    if any(cell is None or not cell.runs for cell, _ in cells):
        return Finding(table.study, claim, row, MISSING)
    diverged = [(cell, weight) for cell, weight in cells if cell.diverged]
    if any(weight > 0 for _, weight in diverged):  # a diverged run is worse than any number
        return Finding(table.study, claim, row, CONTRADICTED)
    if any(cell.diverged == len(cell.runs) for cell, _ in diverged):
        return Finding(table.study, claim, row, HOLDS)
    seeds = sorted(set.intersection(*(set(cell.values) for cell, _ in cells)))
    if not seeds:
        return Finding(table.study, claim, row, MISSING)
    sums = [sum(weight * cell.values[seed] for cell, weight in cells) - claim.margin for seed in seeds]
    low, high = bounds(sums, CONFIDENCE)
    if high < 0:  # what diverged in some of the seeds speaks for the claim, but with no known confidence
        verdict = NOT_SHOWN if diverged else CONTRADICTED
    else:
        verdict = HOLDS if low > 0 or (not claim.strict and len(seeds) > 1) else NOT_SHOWN
    return Finding(table.study, claim, row, verdict, Spread.of(sums), low, high)
