"""The orderings that the paper claims, tested on our numbers seed by seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from luqrun.report.experiments import ROUNDING_TABLES
from luqrun.report.spread import Spread, bounds
from luqrun.report.tables import Cell, Table

CONFIDENCE = 0.95
ENOUGH = 5  # seeds for a sign test: all of n one way has a chance of 0.5^n, 3 % for 5
HOLDS, NOT_CONTRADICTED = "holds", "not contradicted"
NOT_SHOWN, CONTRADICTED, MISSING = "not shown", "contradicted", "runs are missing"


@dataclass(frozen=True)
class Claim:
    """A weighted sum of cells is above a margin, in points of the metric; of one of which less is better, below.

    cells: (row or None for each row, column) to weight. strict: it must be above with confidence; else it is enough
    that it is not below with confidence ("not worse"), which is called "not contradicted".
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
    """Of samples averaged for the weight gradient alone (the default), and for both GEMMs (the reference code)."""
    counts = (1, 2, 4, 8, 16)
    names = {
        "the weight gradient": {count: f"fp2_smp{count}" for count in counts},
        "both GEMMs": {1: "fp2_smp1", **{count: f"fp2_both{count}" for count in counts[1:]}},
    }
    more = [
        _above("fig5", f"{b} samples averaged for {where} are not worse than {a}", of[b], of[a], strict=False)
        for where, of in names.items()
        for a, b in pairwise(counts)
    ]
    near = "16 samples averaged for both GEMMs come within 1 point of full-precision gradients"
    return [*more, _above("fig5", near, "fp2_both16", "forward_only", margin=-1.0)]


def _finetunes() -> list[Claim]:
    """At least half of the loss, fp32 less LUQ + SMP, is gone after FNT; and so it is against fp32 trained as long."""
    found = []
    for count, epochs in enumerate(("one epoch", "two epochs", "three epochs"), 1):
        loss = {(None, "fp32_none"): 0.5, (None, "luq_smp2_none"): -0.5}
        tuned, longer = (None, f"luq_smp2_fnt{count}"), (None, f"fp32_fnt{count}")
        recovered = {tuned: 1.0, (None, "luq_smp2_none"): -0.5, (None, "fp32_none"): -0.5}
        text = f"{epochs} of FNT recover{'s' if count == 1 else ''} at least half of the loss of LUQ + SMP"
        same = f"after {epochs} of FNT, LUQ + SMP lacks at most half as much of fp32 after as many (our control)"
        found += [Claim("table3", text, recovered), Claim("table3", same, {**loss, longer: -1.0, tuned: 1.0})]
    return found


def _phases() -> list[Claim]:
    """What NVIDIA and Chmiel et al. claim of their last phases, and NVIDIA of a phase of the backward pass, against as
    many epochs more in 4 bits. How NVIDIA evaluates is not known."""
    found = []
    for quant in ("luq", "mxfp4", "nvfp4_nvidia"):
        longer, forward, backward = f"{quant}_longer3", f"{quant}_forward_high3", f"{quant}_qaf3"
        told = f"{quant}, evaluated in 4 bits,"
        found += [
            _beside("phases", f"{told} gains by a last phase with a forward pass in high precision", forward, longer),
            _beside("phases", f"{told} gains by one with a backward pass in high precision", backward, longer),
            _beside("phases", f"{told} gains more by the forward pass than by the backward pass", forward, backward),
        ]
    return found


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
    _beside("table2", "LUQ is above biased FP4", "luq", "biased_log"),
    _beside("table3", "fp32 is above LUQ + SMP", "fp32_none", "luq_smp2_none"),
    *_finetunes(),
    _beside("table6", "4-bit gradients cost more than a 4-bit forward", "forward_only", "backward_only"),
    *_samples(),
    _above("options", "hindsight costs at most 1 point", "luq_hindsight", "luq", margin=-1.0),
    _above("options", "power-of-two scales cost at most 1 point", "luq_pow2", "luq", margin=-1.0),
    # Of others' papers (FACTS 0.6, 2.3 to 2.6), on our networks.
    _beside("formats", "NVFP4 is above MXFP4, both to nearest", "nvfp4", "mxfp4"),
    _beside("formats", "TetraJet is above MXFP4 to nearest", "tetrajet", "mxfp4"),
    _beside("formats", "a rotated MXFP4 backward is better stochastic than to nearest", "mxfp4_rht_sr", "mxfp4_rht"),
    _beside("formats", "Quartet is not worse than with a stochastic backward", "quartet", "quartet_sr", strict=False),
    _beside("formats", "NVIDIA's recipe is above plain NVFP4", "nvfp4_nvidia", "nvfp4"),
    _beside("formats", "four over six is not worse than NVIDIA's recipe", "nvfp4_46", "nvfp4_nvidia", strict=False),
    _beside("formats", "Quartet II is above NVIDIA's recipe", "quartet2", "nvfp4_nvidia"),
    _beside("formats", "Quartet II is above LUQ", "quartet2", "luq"),
    _beside("replications", "LUQ is above the LUQ that Xi et al. coded", "luq", "luq_xi"),
    _beside("replications", "LUQ is not worse than its own supplement", "luq", "luq_supplement", strict=False),
    *_phases(),
)


@dataclass(frozen=True)
class Finding:
    """What our numbers say of a claim.

    spread: of the sum of cells, over the seeds that all of them finished; low, high: the bounds of its mean. note: what
    else decides, such as the seeds that diverged.
    """

    study: str
    claim: Claim
    row: str | None
    verdict: str
    spread: Spread | None = None
    low: float | None = None
    high: float | None = None
    note: str = ""

    @property
    def passes(self) -> bool:
        """Whether --check accepts it."""
        return self.verdict in (HOLDS, NOT_CONTRADICTED)

    def __str__(self):
        where = f"{self.study}" + (f", {self.row}" if self.row else "")
        parts = [self.note] if self.note else []
        if self.spread is not None:
            claimed, of = "", ""
            if self.claim.margin:
                claimed, of = f", at least {self.claim.margin:+g} claimed", " of the difference"
            parts += [
                f"{self.spread.mean:+.2f} points{claimed}",
                f"bounds{of} {self.low:+.2f} and {self.high:+.2f}, each with {CONFIDENCE:.0%}",
                f"seeds: {self.spread.count}",
            ]
        why = f" ({'; '.join(parts)})" if parts else ""
        return f"{where}: {self.claim.text}: {self.verdict}{why}"


def how_tested(findings: Sequence[Finding]) -> str:
    """What a reader of the findings must know: how many claims were tested, how, and corrected for what."""
    measured = sum(finding.claim.table in ROUNDING_TABLES for finding in findings)
    trained = len(findings) - measured
    parts = []
    if trained:
        parts.append(
            f"{trained} claims about trainings, each tested alone, without a correction for their number: one that is "
            f'not true is said to hold with a chance of up to {1 - CONFIDENCE:.0%}. "{HOLDS}" and "{CONTRADICTED}": '
            f"with {CONFIDENCE:.0%} confidence, by Student's t over seeds, one-sided; where one side diverged, by a "
            f"sign test of at least {ENOUGH} seeds."
        )
    if measured:
        parts.append(
            f'{measured} claims about measured rounding: "{HOLDS}" and "{CONTRADICTED}" compare number with number; '
            f'"unbiased" is a z-test of each point, with a Bonferroni correction for the points of its table.'
        )
    of = [name for name, count in (('"not worse"', trained), ('"unbiased"', measured)) if count]
    return " ".join([*parts, f'"{NOT_CONTRADICTED}": said of {" and ".join(of)}, and no proof of it.'])


def check_claims(tables: Sequence[Table]) -> list[Finding]:
    """A finding for each claim about these tables: of those that have its cells, and in rows that have a run."""
    return [
        _test(table, claim, row)
        for table in tables
        for claim in CLAIMS
        if claim.table == table.name
        for row in (_begun(table) if any(row is None for row, _ in claim.cells) else [None])
        if all((own or row, column) in table.cells for own, column in claim.cells)
    ]


def _begun(table: Table) -> list[str]:
    return [row for row in table.rows if table.metric(row) is not None]


def _test(table: Table, claim: Claim, row: str | None) -> Finding:
    cells = [(table.cells[own or row, column], weight) for (own, column), weight in claim.cells.items()]
    if not all(cell.runs for cell, _ in cells):
        return Finding(table.study, claim, row, MISSING)
    metric, *others = {table.metric(cell.row) for cell, _ in cells}
    if others:
        return Finding(table.study, claim, row, NOT_SHOWN, note="its runs have several metrics")
    common = set.intersection(*(set(cell.runs) for cell, _ in cells))
    if not common:
        return Finding(table.study, claim, row, MISSING, note="no seed in common")
    note = _diverged(claim, cells)
    sides = {weight > 0 for cell, weight in cells if cell.diverged}
    if len(sides) > 1 or (sides and len(cells) > 2):  # a tie, or a sum that is not known
        return Finding(table.study, claim, row, NOT_SHOWN, note=note)
    if any(cell.diverged == len(cell.runs) for cell, _ in cells):  # worse than any number
        shown = CONTRADICTED if True in sides else HOLDS
        return Finding(table.study, claim, row, shown if len(common) >= ENOUGH else NOT_SHOWN, note=note)
    seeds = sorted(set.intersection(*(set(cell.values) for cell, _ in cells)))
    if not seeds:
        return Finding(table.study, claim, row, NOT_SHOWN, note=note)
    sign = 1 if metric.higher_is_better else -1
    sums = [sign * sum(weight * cell.values[seed] for cell, weight in cells) for seed in seeds]
    low, high = bounds(sums, CONFIDENCE)
    if low > claim.margin:
        verdict = HOLDS
    elif high < claim.margin:
        verdict = CONTRADICTED
    else:
        verdict = NOT_SHOWN if claim.strict or len(seeds) < 2 else NOT_CONTRADICTED
    if sides and (verdict == CONTRADICTED) != (True in sides):  # the seeds that diverged say the opposite
        verdict = NOT_SHOWN
    return Finding(table.study, claim, row, verdict, Spread.of(sums), low, high, note)


def _diverged(claim: Claim, cells: Sequence[tuple[Cell, float]]) -> str:
    """Such as "diverged: luq in 0 of 3 seeds, uniform_sr in 3 of 3"; "" where no run did."""
    if not any(cell.diverged for cell, _ in cells):
        return ""
    names = [row or column for row, column in claim.cells]
    counts = [f"{cell.diverged} of {len(cell.runs)}" for cell, _ in cells]
    first, *others = [f"{name} in {count}" for name, count in zip(names, counts, strict=True)]
    return "diverged: " + ", ".join([f"{first} seeds", *others])
