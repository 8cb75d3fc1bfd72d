"""One self-contained page for a study's tables: figures inside, each number linked to the runs that made it."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from html import escape

import yaml

from luqrun.report import figures, rounding
from luqrun.report.claims import Finding, how_tested
from luqrun.report.records import LeftOut, Record
from luqrun.report.render import about, about_rounding, commands_of_all, header, how_made, line
from luqrun.report.tables import Table

NAMESPACE = r' xmlns(:\w+)?="[^"]*"'  # XML's; HTML knows an <svg> without
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #ddd; text-align: left; }
td.number { font-variant-numeric: tabular-nums; }
.missing { color: #b00; } .holds { color: #070; } .open { color: #b00; }
pre { background: #f6f6f6; padding: .6rem; overflow-x: auto; }
svg { max-width: 100%; height: auto; }
details { margin: .3rem 0; } details:target { outline: 2px solid #06c; }
"""


def page(
    name: str,
    tables: Sequence[Table],
    rounding_tables: Sequence[rounding.RoundingTable],
    findings: Sequence[Finding],
    left_out: Sequence[LeftOut],
) -> str:
    """The page of the studies under outputs/`name`."""
    parts = [f"<h1>{escape(name)}</h1>"]
    parts += [_table(table) for table in tables]
    parts += [_rounding(table) for table in rounding_tables]
    if findings:
        items = (
            f'<li class="{"holds" if finding.passes else "open"}">{escape(str(finding))}</li>' for finding in findings
        )
        parts.append(f"<h2>What holds of the paper's claims</h2><p>{escape(how_tested(findings))}</p>")
        parts.append(f"<ul>{''.join(items)}</ul>")
    if left_out:
        items = (f"<li>{escape(str(each.path))}: {escape(each.reason)}</li>" for each in left_out)
        parts.append(f"<h2>Runs left out</h2><ul>{''.join(items)}</ul>")
    records = [run for table in tables for run in table.runs]
    parts.append("<h2>Runs</h2>")
    parts += [_run(record) for record in [*records, *(record for table in rounding_tables for record in table.records)]]
    head = f'<meta charset="utf-8"><title>luqrun: {escape(name)}</title><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n' + "\n".join(parts) + "\n</body></html>\n"


def _table(table: Table) -> str:
    rows = []
    for cell in table.cells.values():
        values = [escape(value) for value in line(table, cell)]
        links = " ".join(f'<a href="#{_anchor(run)}">{seed}</a>' for seed, run in sorted(cell.runs.items()))
        style = ' class="missing"' if cell.missing else ' class="number"'
        ours = header(table).index("against our baseline") - 1
        cells = [f"<td>{value}</td>" for value in values[:ours]] + [f"<td{style}>{values[ours]}</td>"]
        cells += [f'<td class="number">{value}</td>' for value in values[ours + 1 :]]
        rows.append(f"<tr>{''.join(cells)}<td>{links}</td></tr>")
    listed = _made_by(commands_of_all(table)) + _missing(*table.missing())
    body = _html_table((*header(table), "runs by seed"), rows)
    notes = "".join(f"<p>{escape(note)}</p>" for note in about(table))
    return f"<h2>{escape(table.title)}</h2>{body}{notes}{listed}{_svg(figures.draw(table))}"


def _made_by(commands: Sequence[str]) -> str:
    return f"<p>{how_made(commands)}</p><pre>{escape(chr(10).join(commands))}</pre>" if commands else ""


def _missing(count: int, commands: Sequence[str]) -> str:
    if not count:
        return ""
    shown = escape("\n".join(commands))
    return f"<details><summary>{count} missing runs</summary><pre>{shown}</pre></details>"


def _rounding(table: rounding.RoundingTable) -> str:
    rows = ["<tr>" + "".join(f"<td>{escape(value)}</td>" for value in row) + "</tr>" for row in table.lines()]
    links = ", ".join(f'<a href="#{_anchor(run)}">{escape(run.row)}</a>' for run in table.records)
    about = f"<p>{escape(about_rounding(table))} Runs: {links}.</p>" if table.records else ""
    body = (_html_table(rounding.HEADER, rows) if rows else "") + about
    listed = _made_by(commands_of_all(table)) + _missing(table.missing, table.commands)
    return f"<h2>{escape(table.title)}</h2>{body}{listed}{_svg(rounding.draw(table))}"


def _html_table(header: Sequence[str], rows: Sequence[str]) -> str:
    return f"<table><tr>{''.join(f'<th>{escape(name)}</th>' for name in header)}</tr>{''.join(rows)}</table>"


def _run(record: Record) -> str:
    commit = record.run.get("git_commit") or "unknown"
    about = f"{escape(record.command)}\n\ncommit {escape(commit)}, {escape(str(record.run.get('kernel_backend')))}"
    return (
        f'<details id="{_anchor(record)}"><summary>{escape(record.study)}/{escape(record.path.name)}</summary>'
        f"<pre>{about}</pre><pre>{escape(yaml.safe_dump(record.config, sort_keys=False))}</pre></details>"
    )


def _anchor(record: Record) -> str:
    return re.sub(r"[^\w-]", "-", f"{record.study}-{record.path.name}")


def _svg(figure) -> str:
    if figure is None:
        return ""
    text = io.StringIO()
    about = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(text, format="svg", bbox_inches="tight", metadata=about)
    figures.pyplot().close(figure)
    _, tag, rest = text.getvalue().partition("<svg")  # without the XML declaration
    return f"<figure>{re.sub(NAMESPACE, '', tag + rest)}</figure>"
