"""The command luqrun-tables; scripts/tables.py is the same in a checkout that is not installed."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from itertools import count
from pathlib import Path

from luqrun.errors import UserError
from luqrun.report import figures, rounding, summaries
from luqrun.report.claims import CONFIDENCE, NOT_CONTRADICTED, check_claims
from luqrun.report.consistency import trained_alike
from luqrun.report.experiments import check_tables
from luqrun.report.html import page
from luqrun.report.index import Entry, index
from luqrun.report.records import LeftOut, printable
from luqrun.report.render import cells_csv, csv_text, markdown, markdown_findings, markdown_rounding, rounding_csv
from luqrun.report.tables import Table, build_tables
from luqrun.runs.folder import write_atomically

NAME = "luqrun-tables"
INDEX, FINDINGS = "tables", "findings"


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and report; the exit code: 0, or 1 for a mistake or a claim that does not hold."""
    parser = argparse.ArgumentParser(NAME, description="The paper's tables and figures from run folders and summaries.")
    parser.add_argument(
        "outputs", type=Path, nargs="+", help="folders of studies, or of summaries (the JSON files that this writes)"
    )
    parser.add_argument("--table", action="append", default=[], help="only this one (may be repeated)")
    parser.add_argument("--out", type=Path, help="where files go; default: tables/ in the first folder")
    parser.add_argument("--html", action="store_true", help="a self-contained page for each study too")
    parser.add_argument(
        "--check",
        action="store_true",
        help=f"fail where a claim of the paper is not shown with {CONFIDENCE:.0%} confidence "
        f"(of 'not worse' it is enough that it is {NOT_CONTRADICTED})".replace("%", "%%"),
    )
    chosen = parser.parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name, or a terminal, may know less than Unicode
    try:
        return report(
            chosen.outputs, chosen.table, chosen.out or chosen.outputs[0] / "tables", chosen.html, chosen.check
        )
    except (UserError, OSError) as error:
        parser.exit(1, f"{NAME}: {printable(str(error))}\n")


def report(inputs: Sequence[Path], wanted: Sequence[str], out: Path, html: bool, check: bool) -> int:
    """Write Markdown, CSV, figures and summaries of each table to `out`, with an index, and print the Markdown."""
    check_tables(list(wanted))
    for folder in inputs:
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder; it must hold studies, as outputs/ does, or summaries")
    own = out.resolve() in [folder.resolve() for folder in inputs]  # what is left out of its files stays in them
    if wanted and own:
        raise UserError(
            f"--table would leave the other tables out of the index and the findings in {out}, from which runs are "
            "read: give another folder with --out"
        )
    records, left_out = summaries.read_inputs(inputs)
    records, others = trained_alike(records)
    tables = build_tables(records, wanted)
    measured, again = rounding.build_rounding_tables(records, wanted)
    left_out = [LeftOut(_within(each.path, inputs), printable(each.reason)) for each in [*left_out, *others, *again]]
    findings = check_claims(tables) + rounding.check_rounding(measured)
    pages = sorted({_top(table.study) for table in [*tables, *measured]}) if html else []
    measured_names = _rounding_names(measured)
    names = _names(tables, measured_names)
    out.mkdir(parents=True, exist_ok=True)
    where = out, pages, own
    entries = [_write_rounding(*both, *where) for both in zip(measured, measured_names, strict=True)]
    entries += [_write_table(*both, *where) for both in zip(tables, names, strict=True)]
    notes = markdown_findings(findings, left_out)
    if not tables and not measured:
        print(f"no runs of tables under {', '.join(map(str, inputs))}; luqrun -m +experiment=fig2/embedded makes some")
    print(notes, end="")
    _write(out / f"{FINDINGS}.md", notes)
    _write(out / f"{INDEX}.md", index(entries, findings, left_out, (each.results for each in records)))
    for name in pages:
        _write(out / f"{name}.html", _page(name, tables, measured, findings, left_out))
    failed = [finding for finding in findings if not finding.passes]
    if check and not findings:
        print("--check: there is no run of a table that the paper makes claims about")
        return 1
    if check and failed:
        print(f"--check: {len(failed)} of {len(findings)} claims are not shown in these runs")
        return 1
    return 0


def _within(path: Path, inputs: Sequence[Path]) -> Path:
    """In the innermost of the folders that hold it."""
    around = [folder for folder in inputs if path.is_relative_to(folder)]
    folder = max(around, key=lambda each: len(each.parts), default=None)
    return Path(printable(str(path if folder is None else path.relative_to(folder))))


def _top(study: str) -> str:
    """The folder of studies that share a page."""
    return study.split("/")[0]


def _rounding_names(tables: Sequence[rounding.RoundingTable]) -> list[str]:
    """As `_names`, of what was measured: as the table, with its study where several have measured it."""
    names = [table.name for table in tables]
    return [
        name if names.count(name) == 1 else f"{name}-{_flat(table.study)}"
        for name, table in zip(names, tables, strict=True)
    ]


def _flat(study: str) -> str:
    return study.replace("/", "-")


def _names(tables: Sequence[Table], taken: Sequence[str]) -> list[str]:
    """What the files of each table are called: as its study, with more where that is not enough."""
    flat = [_flat(table.study) for table in tables]
    names, used = [], {INDEX, FINDINGS, *taken}
    for table, name in zip(tables, flat, strict=True):
        name += f"-{table.name}-{table.scale}" if flat.count(name) > 1 else ""
        candidates = (f"{name}-{number}" if number > 1 else name for number in count(1))
        names.append(next(each for each in candidates if not {each, _cells(each)} & used))
        used |= {names[-1], _cells(names[-1])}
    return names


def _cells(name: str) -> str:
    """What the file of a table's cells is called."""
    return f"{name}-cells"


def _write_table(table: Table, name: str, out: Path, pages: Sequence[str], own: bool) -> Entry:
    text = markdown(table)
    print(text)
    _write(out / f"{name}.md", text)
    _write(out / f"{name}.csv", csv_text(table))
    _write(out / f"{_cells(name)}.csv", cells_csv(table))
    path = out / f"{name}.json"
    _write(path, summaries.to_json(table.runs, path if own else None))
    figure = figures.draw(table)
    if figure is not None:
        figures.save(figure, out, name)
    links = _page_link(table.study, pages)
    links |= {"runs (CSV)": f"{name}.csv", "cells (CSV)": f"{_cells(name)}.csv", "runs (JSON)": f"{name}.json"}
    return Entry(table.name, table.study, text, None if figure is None else f"{name}.svg", links)


def _write_rounding(table: rounding.RoundingTable, name: str, out: Path, pages: Sequence[str], own: bool) -> Entry:
    text = markdown_rounding(table)
    print(text)
    _write(out / f"{name}.md", text)
    links = _page_link(table.study, pages)
    if table.records:
        _write(out / f"{name}.csv", rounding_csv(table.records))
        path = out / f"{name}.json"
        _write(path, summaries.to_json(table.records, path if own else None))
        links |= {"numbers (CSV)": f"{name}.csv", "runs (JSON)": f"{name}.json"}
    figure = rounding.draw(table)
    if figure is not None:
        figures.save(figure, out, name)
    return Entry(table.name, table.study, text, None if figure is None else f"{name}.svg", links)


def _page_link(study: str, pages: Sequence[str]) -> dict[str, str]:
    top = _top(study)
    return {f"page of {top}": f"{top}.html"} if top in pages else {}


def _page(name: str, tables, measured, findings, left_out) -> str:
    def ours(study: str) -> bool:
        return _top(study) == name

    return page(
        name,
        [table for table in tables if ours(table.study)],
        [table for table in measured if ours(table.study)],
        [finding for finding in findings if ours(finding.study)],
        [each for each in left_out if ours(str(each.path))],
    )


def _write(path: Path, text: str) -> None:
    write_atomically(path, text.encode(errors="backslashreplace"))  # a file's name may be no text
