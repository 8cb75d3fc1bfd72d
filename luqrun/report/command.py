"""What scripts/tables.py does."""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from luqrun.errors import UserError
from luqrun.report import figures, measured
from luqrun.report.claims import CONFIDENCE, NOT_CONTRADICTED, check_claims
from luqrun.report.html import page
from luqrun.report.layout import check_tables
from luqrun.report.records import LeftOut, Record, printable, read_outputs
from luqrun.report.render import csv_text, markdown, markdown_findings
from luqrun.report.settings import of_one_kind
from luqrun.report.tables import Table, build_tables
from luqrun.run_folder import write_atomically


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and report; the exit code: 0, or 1 for a mistake or a claim that does not hold."""
    parser = argparse.ArgumentParser(description="The paper's tables and figures from run folders.")
    parser.add_argument("outputs", type=Path, help="the folder of studies, such as outputs/")
    parser.add_argument("--table", action="append", default=[], help="only this one (may be repeated)")
    parser.add_argument("--out", type=Path, help="where files go; default: OUTPUTS/tables")
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
        return report(chosen.outputs, chosen.table, chosen.out or chosen.outputs / "tables", chosen.html, chosen.check)
    except (UserError, OSError) as error:
        parser.exit(1, f"tables.py: {printable(str(error))}\n")


def report(outputs: Path, wanted: Sequence[str], out: Path, html: bool, check: bool) -> int:
    """Write Markdown, CSV, figures and summaries of each table to `out`, and print the Markdown."""
    check_tables(list(wanted))
    if not outputs.is_dir():
        raise UserError(f"{outputs} is not a folder; it must hold studies, as outputs/ does")
    records, left_out = read_outputs(outputs)
    records, others = of_one_kind(records)
    tables = build_tables(records, wanted)
    rounding, again = measured.build_measured(records, wanted)
    left_out = [LeftOut(_within(each.path, outputs), printable(each.reason)) for each in [*left_out, *others, *again]]
    findings = check_claims(tables) + measured.check_measured(rounding)
    out.mkdir(parents=True, exist_ok=True)
    for table in tables:
        name = _flat(table.study)
        if sum(_flat(other.study) == name for other in tables) > 1:  # one study, several tables
            name += f"-{table.name}-{table.scale}"
        _write_table(table, out, name)
    for each in rounding:
        alone = sum(other.name == each.name for other in rounding) == 1
        _write_measured(each, out, each.name if alone else f"{each.name}-{_flat(each.study)}")
    notes = markdown_findings(findings, left_out)
    if not tables and not rounding:
        print(f"no runs of tables under {outputs}; luqrun -m +experiment=fig2/glyphs makes some")
    print(notes, end="")
    _write(out / "findings.md", notes)
    if html:
        shown = [table.study for table in [*tables, *rounding]]
        for name in sorted({study.split("/")[0] for study in shown}):
            _write(out / f"{_flat(name)}.html", _page(name, tables, rounding, findings, left_out))
    failed = [finding for finding in findings if not finding.passes]
    if check and not findings:
        print("--check: there is no run of a table that the paper makes claims about")
        return 1
    if check and failed:
        print(f"--check: {len(failed)} of {len(findings)} claims are not shown in these runs")
        return 1
    return 0


def _within(path: Path, outputs: Path) -> Path:
    return Path(printable(str(path.relative_to(outputs) if path.is_relative_to(outputs) else path)))


def _write_table(table: Table, out: Path, name: str) -> None:
    text = markdown(table)
    print(text)
    _write(out / f"{name}.md", text)
    _write(out / f"{name}.csv", csv_text(table))
    runs = [run for cell in table.cells.values() for run in cell.runs.values()]
    _write(out / f"{name}.json", json.dumps([_summary(run) for run in runs], indent=1) + "\n")
    figure = figures.draw(table)
    if figure is not None:
        figures.save(figure, out, name)


def _write_measured(table: measured.Measured, out: Path, name: str) -> None:
    text = measured.markdown(table)
    print(text)
    _write(out / f"{name}.md", text)
    figure = measured.draw(table)
    if figure is not None:
        figures.save(figure, out, name)


def _page(name: str, tables, rounding, findings, left_out) -> str:
    def ours(study: str) -> bool:
        return study.split("/")[0] == name

    return page(
        name,
        [table for table in tables if ours(table.study)],
        [table for table in rounding if ours(table.study)],
        [finding for finding in findings if ours(finding.study)],
        left_out,
    )


def _summary(record: Record) -> dict:
    """What is kept of a run where its folder is not: no paths, no checkpoints."""
    kept = ("status", "diverged_at_step", "git_commit", "git_dirty", "versions", "device", "kernel_backend", "threads")
    cell = {"row": record.row, "column": record.column, "seed": record.seed}
    about = {name: record.run[name] for name in kept if name in record.run}
    return {
        "run": record.path.name,
        **cell,
        "command": record.command,
        "top1": record.top1,
        "curve": record.curve,
        **about,
    }


def _flat(study: str) -> str:
    return study.replace("/", "-")


def _write(path: Path, text: str) -> None:
    write_atomically(path, text.encode(errors="backslashreplace"))  # a file's name may be no text
