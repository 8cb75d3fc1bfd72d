"""The index of a report: every table with its figure, what holds of it, and where its numbers are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple
from urllib.parse import quote

from luqrun import RESULTS
from luqrun.report.claims import Finding, how_tested
from luqrun.report.experiments import TITLES
from luqrun.report.records import LeftOut
from luqrun.report.render import list_findings, list_left_out


class Entry(NamedTuple):
    """A table of the report. figure: its file; links: to its other files, by name."""

    table: str
    study: str
    text: str
    figure: str | None
    links: dict[str, str]


def index(
    entries: Sequence[Entry], findings: Sequence[Finding], left_out: Sequence[LeftOut], results: Iterable[int] = ()
) -> str:
    """The Markdown of tables.md, the tables in the paper's order. results: which RESULTS the runs are of."""
    parts = ["# The paper's tables and figures, from our runs"]
    if theirs := sorted(set(results)):
        now = "" if theirs == [RESULTS] else f"; this luqrun is RESULTS {RESULTS}, which computes other numbers"
        parts.append(f"The runs are of RESULTS {' and '.join(map(str, theirs))}{now}.")
    parts += [how_tested(findings)] if findings else []
    order = list(TITLES)
    for entry in sorted(entries, key=lambda each: order.index(each.table)):
        parts.append(entry.text.rstrip())
        if entry.figure:
            parts.append(f"![{TITLES[entry.table]}]({quote(entry.figure)})")
        own = [each for each in findings if (each.claim.table, each.study) == (entry.table, entry.study)]
        parts += [list_findings(own)] if own else []
        parts.append(", ".join(f"[{name}]({quote(path)})" for name, path in entry.links.items()))
    parts += [list_left_out(left_out)] if left_out else []
    return "\n\n".join(parts) + "\n"
