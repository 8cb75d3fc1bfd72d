"""A table: its cells, with ours, the paper's, both differences to a baseline, and what is missing."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from luqrun.report import rerun_commands
from luqrun.report.experiments import BASELINES, TITLES, Expected, expected_of, experiments_of
from luqrun.report.paper import Published, Replication, published, replications
from luqrun.report.records import Record
from luqrun.report.spread import Spread
from luqrun.runs.metric import Metric


@dataclass
class Cell:
    """One cell: its runs by seed, and the runs that are missing."""

    row: str
    column: str
    runs: dict[int, Record] = field(default_factory=dict)
    missing: list[Expected] = field(default_factory=list)

    @property
    def values(self) -> dict[int, float]:
        """The metric by seed, without the diverged."""
        return {seed: run.value for seed, run in self.runs.items() if run.value is not None}

    @property
    def spread(self) -> Spread | None:
        """Of the values; None without any."""
        return Spread.of(list(self.values.values())) if self.values else None

    @property
    def diverged(self) -> int:
        return sum(run.diverged for run in self.runs.values())

    def ours(self) -> str:
        """Such as "78.9 ± 1.1 (3)", "diverged (2 of 3); 70.1 (1)", or "missing"."""
        parts = [f"diverged ({self.diverged} of {len(self.runs)})"] if self.diverged else []
        parts += [str(self.spread)] if self.values else []
        if self.missing:
            parts.append("missing" if not self.runs else f"{len(self.missing)} missing")
        return "; ".join(parts)

    def commands(self) -> list[str]:
        """Those that make what is missing: the seeds of a command as one sweep."""
        seeds: dict[tuple[str, str], list[str]] = {}
        for wish in self.missing:
            before, _, after = wish.command.partition(f" seed={wish.seed}")
            seeds.setdefault((before, after), []).append(str(wish.seed))
        return [
            f"{before.replace('luqrun', 'luqrun -m', 1) if len(own) > 1 else before} seed={','.join(own)}{after}"
            for (before, after), own in seeds.items()
        ]


@dataclass
class Table:
    """A table of one study. rows and columns keep the experiment's order. Each row may have a metric of its own."""

    study: str
    name: str
    scale: str
    cells: dict[tuple[str, str], Cell]

    @property
    def runs(self) -> list[Record]:
        return [run for cell in self.cells.values() for run in cell.runs.values()]

    @property
    def metrics(self) -> list[Metric]:
        """What its runs are compared by, each once."""
        return list(dict.fromkeys(map(self._metric_of_run, self.runs)))

    def metric(self, row: str) -> Metric | None:
        """What the runs of a row are compared by; None where there is no run."""
        own = [run for (name, _), cell in self.cells.items() if name == row for run in cell.runs.values()]
        return self._metric_of_run(min(own, key=lambda run: run.diverged)) if own else None

    def _metric_of_run(self, run: Record) -> Metric:
        """A run that diverged never came to the test data: its metric is that of the others like it."""
        on_test = any(other.tested and other.curve_metric == run.curve_metric for other in self.runs)
        return run.curve_metric.of_test if run.diverged and on_test else run.metric

    @property
    def title(self) -> str:
        return f"{TITLES[self.name]} ({self.study})"

    @property
    def rows(self) -> list[str]:
        return list(dict.fromkeys(row for row, _ in self.cells))

    def _compared_with(self, cell: Cell) -> tuple[str, str]:
        row, column = BASELINES[self.name]
        return row or cell.row, column or cell.column

    def is_baseline(self, cell: Cell) -> bool:
        return self._compared_with(cell) == (cell.row, cell.column)

    def baseline(self, cell: Cell) -> Cell | None:
        """The cell that `cell` is compared with; None for the baseline itself, and where there is none."""
        return None if self.is_baseline(cell) else self.cells.get(self._compared_with(cell))

    def difference(self, cell: Cell) -> Spread | None:
        """Ours less our baseline, seed by seed; None where they have no seed in common, or not one metric."""
        base = self.baseline(cell)
        if base is None or self.metric(base.row) != self.metric(cell.row):
            return None
        pairs = [value - base.values[seed] for seed, value in cell.values.items() if seed in base.values]
        return Spread.of(pairs) if pairs else None

    def missing(self) -> tuple[int, list[str]]:
        """How many runs are missing, and the commands that make them."""
        cells = self.cells.values()
        return sum(len(cell.missing) for cell in cells), [command for cell in cells for command in cell.commands()]

    def paper(self, cell: Cell) -> Published | None:
        return published(self.name, cell.row, cell.column)

    def paper_difference(self, cell: Cell) -> float | None:
        """The paper's number less the paper's baseline."""
        base = self.baseline(cell)
        theirs = [self.paper(each) if each else None for each in (cell, base)]
        values = [each.value if each else None for each in theirs]
        return None if None in values else values[0] - values[1]

    def others(self, cell: Cell) -> tuple[Replication, ...]:
        """What others measured of the paper's scheme on the paper's network."""
        return replications(self.name, cell.row, cell.column)


def build_tables(records: Sequence[Record], wanted: Sequence[str] = ()) -> list[Table]:
    """A table for each study that trains one; `wanted`: of these names only (default: all)."""
    studies: dict[tuple[str, str, str], list[Record]] = {}
    for record in records:
        if record.table in BASELINES and (not wanted or record.table in wanted):
            studies.setdefault((record.study, record.table, record.scale or ""), []).append(record)
    return [build_table(*key, runs) for key, runs in sorted(studies.items())]


def build_table(study: str, name: str, scale: str, records: Sequence[Record]) -> Table:
    """The table of these records, one at least, which are all of this study, name and scale."""
    cells: dict[tuple[str, str], Cell] = {}
    by_cell = {(record.row, record.column, record.seed): record for record in records}
    for wish in _wishes(name, scale, records):
        cell = cells.setdefault((wish.row, wish.column), Cell(wish.row, wish.column))
        if (wish.row, wish.column, wish.seed) not in by_cell:
            cell.missing.append(wish)
    for (row, column, seed), record in sorted(by_cell.items()):
        cells.setdefault((row, column), Cell(row, column)).runs[seed] = record
    return Table(study, name, scale, cells)


def _wishes(name: str, scale: str, records: Sequence[Record]) -> list[Expected]:
    """What the experiments of this table make, each run with what the runs of its experiment were given.

    Of an experiment without runs nothing is known but the study, where all others were given one.
    """
    names, found = experiments_of(name, scale), []
    of_row = {wish.row: wish.experiment for each in names for wish in expected_of(each)}
    runs: dict[str, list[Record]] = {each: [] for each in names}
    for record in records if names else ():
        chosen = rerun_commands.name_of(rerun_commands.experiment(record.overrides) or "")
        runs[chosen if chosen in names else of_row.get(record.row, names[0])].append(record)
    study = tuple(given for given in rerun_commands.shared(records) if rerun_commands.key(given) == "study")
    for each, own in runs.items():
        shared = rerun_commands.shared(own) if own else study
        options = rerun_commands.common_options(own) if own else ()
        found += [_alike(wish, shared, options) for wish in expected_of(each, shared)]
    return found


def _alike(wish: Expected, shared: Sequence[str], options: Sequence[str]) -> Expected:
    """With what all runs of the study were given (--config-dir, an experiment of one's own, study=, schedule.epochs=):
    else it would not be like them."""
    name, shipped, *own = shlex.split(wish.command)
    chosen = rerun_commands.experiment(shared) or shipped
    keys = {rerun_commands.key(part) for part in (chosen, *own)}
    more = [given for given in shared if rerun_commands.key(given) not in keys]
    return replace(wish, command=shlex.join([name, *options, chosen, *own, *more]))
