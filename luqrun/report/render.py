"""Tables as Markdown and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from statistics import fmean

from luqrun.report import rounding
from luqrun.report.claims import Finding, how_tested
from luqrun.report.paper import ABOUT_REPLICATIONS, Replication
from luqrun.report.records import LeftOut, Record
from luqrun.report.rerun_commands import whole_commands
from luqrun.report.spread import Spread
from luqrun.report.tables import Cell, Table
from luqrun.runs.metric import Metric

BLEU = "bleu_signature"  # what summary.json calls the version of that score


OTHERS = "others' LUQ, against their fp32"


def header(table: Table) -> tuple[str, ...]:
    """The columns of a table as text. Where rows have several metrics, each says its own."""
    labels = [metric.label for metric in table.metrics]
    ours = ("ours, " + labels[0],) if len(labels) == 1 else ("metric", "ours")
    return "", *ours, "against our baseline", "paper", "against its baseline", *([OTHERS] if _has_others(table) else [])


def line(table: Table, cell: Cell) -> tuple[str, ...]:
    """A cell as text, in the order of `header`; the first is its name."""
    ours, paper, metric = table.difference(cell), table.paper(cell), table.metric(cell.row)
    difference = "baseline" if table.is_baseline(cell) and cell.runs else "" if ours is None else _signed(ours)
    theirs = table.paper_difference(cell)
    return (
        cell.row if len({column for _, column in table.cells}) == 1 else f"{cell.row}, {cell.column}",
        *([] if len(table.metrics) == 1 else [metric.label if metric else ""]),
        cell.ours(),
        difference,
        "" if paper is None else paper.what if paper.value is None else f"{paper.value:g} ({paper.what})",
        "" if theirs is None else _minus(f"{theirs:+.2f}"),
        *(["; ".join(f"{_minus(_points(each))} ({each.what})" for each in table.others(cell))] * _has_others(table)),
    )


def about(table: Table) -> list[str]:
    """What a reader of its numbers must know, a sentence or two each."""
    notes = ["Mean ± standard deviation (seeds); differences are paired by seed. The paper's are on its own data."]
    if len(table.metrics) > 1:
        notes.append("What is not called test is on validation data.")
    signatures = dict.fromkeys(run.notes[BLEU] for run in table.runs if BLEU in run.notes)
    if signatures:
        notes.append(
            f"BLEU is sacrebleu's, of detokenized text ({' and '.join(signatures)}); the paper's is tokenized BLEU, "
            "which reads higher (its fp32 of 27.5 was 26.5 by sacrebleu for Xi et al. 2023)."
        )
    return [*notes, ABOUT_REPLICATIONS] if _has_others(table) else notes


def _has_others(table: Table) -> bool:
    return any(map(table.others, table.cells.values()))


def _points(replication: Replication) -> str:
    return f"{replication.difference:+.2f}"


def _signed(spread: Spread) -> str:
    return _minus(("+" if spread.mean >= 0 else "") + str(spread))


def _minus(text: str) -> str:
    return text.replace("-", "−")


def markdown(table: Table) -> str:
    """The table, and under it the commands of all of it and of what is missing."""
    lines = [f"## {table.title}", "", _md_row(header(table)), _md_row(["---"] * len(header(table)))]
    lines += [_md_row(line(table, cell)) for cell in table.cells.values()]
    for note in about(table):
        lines += ["", note]
    lines += _missing(*table.missing())
    lines += _made_by(commands_of_all(table))
    return "\n".join(lines) + "\n"


def _missing(count: int, commands: Sequence[str]) -> list[str]:
    return ["", f"Missing runs ({count}):", "```", *commands, "```"] if count else []


def commands_of_all(table: Table | rounding.RoundingTable) -> list[str]:
    """What makes all of a table, with what all its runs were given beside.

    Empty where there is no experiment of it, or nothing was measured yet.
    """
    runs = table.records if isinstance(table, rounding.RoundingTable) else table.runs
    return whole_commands(table.name, runs[0].scale or "", runs) if runs else []


def how_made(commands: Sequence[str]) -> str:
    """The words before these commands."""
    return "All of it is one command:" if len(commands) == 1 else f"All of it is these {len(commands)} commands:"


def _made_by(commands: Sequence[str]) -> list[str]:
    return ["", how_made(commands), "```", *commands, "```"] if commands else []


def markdown_rounding(table: rounding.RoundingTable) -> str:
    """Table 1 or Fig. 1a: what was measured beside the closed forms, and the commands as under the others."""
    lines = [f"## {table.title}"]
    if table.records:
        rows = [rounding.HEADER, ["---"] * len(rounding.HEADER), *table.lines()]
        lines += ["", *map(_md_row, rows), "", about_rounding(table)]
    lines += _missing(table.missing, table.commands)
    lines += _made_by(commands_of_all(table))
    return "\n".join(lines) + "\n"


def about_rounding(table: rounding.RoundingTable) -> str:
    """What a reader of its numbers, of which there are some, must know."""
    return f"In brackets the closed form; {table.records[0].rounding[0]['draws']} draws a point."


def _md_row(values: Sequence[str]) -> str:
    return "| " + " | ".join(value.replace("|", "\\|") for value in values) + " |"


def csv_text(table: Table) -> str:
    """A line a run, the missing ones too: study, row, column, seed, status, metric, value, paper, command."""
    rows = []
    for cell in table.cells.values():
        theirs = _papers(table, cell)
        where, metric = (table.study, table.name, cell.row, cell.column), _short(table.metric(cell.row))
        for seed, run in sorted(cell.runs.items()):
            status, value = run.run["status"], "" if run.value is None else round(run.value, 4)
            rows.append([*where, seed, status, metric, value, *theirs, run.command])
        for wish in cell.missing:
            rows.append([*where, wish.seed, "missing", metric, "", *theirs, wish.command])
    which = ("study", "table", "row", "column", "seed", "status")
    return _csv((*which, "metric", "value", "paper", "paper_model", "command"), rows)


CELL_NUMBERS = ("runs", "diverged", "missing", "mean", "deviation", "n")
DIFFERENCE = ("difference", "difference_deviation", "difference_n", "paper", "paper_model", "paper_difference")
REPLICATION = ("others_difference", "others_model")  # of several with a semicolon between them


def cells_csv(table: Table) -> str:
    """A line a cell: its metric and CELL_NUMBERS; DIFFERENCE to our baseline, seed by seed, beside the paper's to its
    own, and REPLICATION, others' of the paper's scheme to theirs."""
    rows = []
    for cell in table.cells.values():
        theirs = table.paper_difference(cell)
        rows.append([
            *(table.study, table.name, cell.row, cell.column, _short(table.metric(cell.row))),
            *(len(cell.runs), cell.diverged, len(cell.missing)),
            *_numbers(cell.spread),
            *_numbers(table.difference(cell)),
            *_papers(table, cell),
            "" if theirs is None else round(theirs, 4),
            "; ".join(map(_points, table.others(cell))),
            "; ".join(f"Xi et al. 2023, {each.what}" for each in table.others(cell)),
        ])  # fmt: skip
    return _csv(("study", "table", "row", "column", "metric", *CELL_NUMBERS, *DIFFERENCE, *REPLICATION), rows)


def _short(metric: Metric | None) -> str:
    """As files call it; "" where there is no run."""
    return "" if metric is None else metric.short


def _papers(table: Table, cell: Cell) -> tuple:
    """The paper's number and whose it is, or what it says of it."""
    paper = table.paper(cell)
    return ("", "") if paper is None else ("" if paper.value is None else paper.value, paper.what)


def _numbers(spread: Spread | None) -> tuple:
    """Mean, deviation and number of values; what there is not is empty."""
    if spread is None:
        return "", "", ""
    return round(spread.mean, 4), "" if spread.deviation is None else round(spread.deviation, 4), spread.count


def rounding_csv(records: Sequence[Record]) -> str:
    """A line a bin of each quantizer: largest bias and variance, and mean squared error; each in closed form too."""
    rows = []
    for record in records:
        for row in record.rounding:
            pairs = [
                of(row[side][name])
                for name, of in (("bias", max), ("variance", max), ("mse", fmean))
                for side in ("measured", "closed_form")
            ]
            about = record.study, record.table, record.row, row["operand"], row["quantizer"], row["drawn"]
            rows.append([*about, *row["bin"], row["draws"], *(f"{value:.9g}" for value in pairs), row["z"]])
    pairs = ("bias", "bias_closed_form", "variance", "variance_closed_form", "mse", "mse_closed_form")
    about = ("study", "table", "row", "operand", "quantizer", "drawn", "bin_low", "bin_high", "draws")
    return _csv((*about, *pairs, "z"), rows)


def _csv(header: Sequence[str], rows: Iterable[Sequence]) -> str:
    text = io.StringIO()
    csv.writer(text).writerows([header, *rows])
    return text.getvalue()


def markdown_findings(findings: Sequence[Finding], left_out: Sequence[LeftOut]) -> str:
    """What holds of the paper's claims, and what was not counted."""
    head = "## What holds of the paper's claims"
    parts = [f"{head}\n\n{how_tested(findings)}\n\n{list_findings(findings)}\n"] if findings else []
    parts += [list_left_out(left_out) + "\n"] if left_out else []
    return "\n".join(parts)


def list_findings(findings: Sequence[Finding]) -> str:
    """A line of Markdown each."""
    return "\n".join(f"- {finding}" for finding in findings)


def list_left_out(left_out: Sequence[LeftOut]) -> str:
    """Under its heading, a line of Markdown each."""
    return "\n".join(["## Runs left out", "", *(f"- {each.path}: {each.reason}" for each in left_out)])
