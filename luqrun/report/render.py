"""Tables as Markdown and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from luqrun.report.claims import Finding, how_tested
from luqrun.report.records import LeftOut
from luqrun.report.tables import Cell, Table

HEADER = ("", "ours, top-1 %", "against our baseline", "paper", "against its baseline")


def line(table: Table, cell: Cell) -> tuple[str, ...]:
    """A cell as text, in the order of HEADER; the first is its name."""
    ours, paper = table.difference(cell), table.paper(cell)
    difference = "baseline" if table.is_baseline(cell) and cell.runs else "" if ours is None else _signed(ours)
    theirs = table.paper_difference(cell)
    return (
        cell.row if len({column for _, column in table.cells}) == 1 else f"{cell.row}, {cell.column}",
        cell.ours(),
        difference,
        "" if paper is None else paper.what if paper.value is None else f"{paper.value:g} ({paper.what})",
        "" if theirs is None else f"{theirs:+.2f}".replace("-", "−"),
    )


def _signed(spread) -> str:
    return ("+" if spread.mean >= 0 else "") + str(spread).replace("-", "−")


def markdown(table: Table) -> str:
    """The table, and under it the commands of what is missing."""
    lines = [f"## {table.title}", "", _md_row(HEADER), _md_row(["---"] * len(HEADER))]
    lines += [_md_row(line(table, cell)) for cell in table.cells.values()]
    lines += [
        "",
        "Mean ± standard deviation (seeds); differences are paired by seed. The paper's are on its own data.",
    ]
    missing, commands = table.missing()
    if missing:
        lines += ["", f"Missing runs ({missing}):", "```", *commands, "```"]
    return "\n".join(lines) + "\n"


def _md_row(values: Sequence[str]) -> str:
    return "| " + " | ".join(value.replace("|", "\\|") for value in values) + " |"


def csv_text(table: Table) -> str:
    """A line a run, the missing ones too: study, row, column, seed, status, top1, paper, command."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["study", "table", "row", "column", "seed", "status", "top1", "paper", "paper_model", "command"])
    for cell in table.cells.values():
        paper = table.paper(cell)
        theirs = ("", "") if paper is None else ("" if paper.value is None else paper.value, paper.what)
        where = table.study, table.name, cell.row, cell.column
        for seed, run in sorted(cell.runs.items()):
            status, top1 = run.run["status"], "" if run.top1 is None else round(run.top1, 4)
            writer.writerow([*where, seed, status, top1, *theirs, run.command])
        for wish in cell.missing:
            writer.writerow([*where, wish.seed, "missing", "", *theirs, wish.command])
    return text.getvalue()


def markdown_findings(findings: Sequence[Finding], left_out: Sequence[LeftOut]) -> str:
    """What holds of the paper's claims, and the folders that were not counted."""
    lines = []
    if findings:
        lines += ["## What holds of the paper's claims", "", how_tested(findings), ""]
        lines += [*(f"- {finding}" for finding in findings), ""]
    if left_out:
        lines += ["## Run folders left out", "", *(f"- {each.path}: {each.reason}" for each in left_out), ""]
    return "\n".join(lines)
