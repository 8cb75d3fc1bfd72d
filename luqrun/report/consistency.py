"""Which runs count: each run once, one a cell and seed, and all runs of a table trained alike; the others are named."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence

from luqrun.report.records import LeftOut, Record, differences, printable

OF_A_CELL = ("quant", "finetune")  # what all tables compare


def one_a_seed(records: Sequence[Record]) -> tuple[list[Record], list[LeftOut]]:
    """A run for each cell and seed, and the others by name.

    Of several RESULTS in a table the latest counts, and in a cell of several layouts of run folders, as where a study
    was repeated with a later luqrun. Of one run that is there more than once (in its folder and as a summary) the first
    counts if all say the same. Else none counts: which of them is meant cannot be known.
    """
    by_cell: dict[tuple, list[Record]] = {}
    latest_of, kept, left_out = {}, [], []
    for record in records:
        latest_of[_table(record)] = max(record.results, latest_of.get(_table(record), 0))
    for record in records:
        latest = latest_of[_table(record)]
        if record.results == latest:
            by_cell.setdefault(_cell(record), []).append(record)
        else:
            reason = f"of RESULTS {record.results}: its table has runs of RESULTS {latest} too"
            left_out.append(LeftOut(record.path, reason))
    for found in by_cell.values():
        latest = max(map(_layout, found))
        earlier = "of an earlier layout: this cell and seed are there of the present one too"
        left_out += [LeftOut(each.path, earlier) for each in found if _layout(each) != latest]
        runs: dict[str, list[Record]] = {}
        for record in found:
            if _layout(record) == latest:
                runs.setdefault(record.path.name, []).append(record)
        agreeing = []
        for same in runs.values():
            if all(_result(record) == _result(same[0]) for record in same):
                agreeing.append(same[0])
            else:
                left_out += _contradicting(same)
        if len(agreeing) == 1:
            kept += agreeing
        else:
            left_out += _duplicates(agreeing)
    return kept, left_out


def _cell(record: Record) -> tuple:
    return record.study, record.table, record.scale, record.row, record.column, record.seed


def _table(record: Record) -> tuple:
    return record.study, record.table, record.scale


def _layout(record: Record) -> int:
    return record.run.get("layout", 1)


def _result(record: Record) -> tuple:
    return record.value, record.diverged, record.rounding


def _contradicting(same: list[Record]) -> list[LeftOut]:
    shown = ", ".join("diverged" if record.diverged else f"{record.value}" for record in same)
    reason = printable(f"this run is there {len(same)} times, with different results: {shown}")
    return [LeftOut(record.path, reason) for record in same]


def _duplicates(same: list[Record]) -> list[LeftOut]:
    trained = [{**record.settings(), **record.trained()} for record in same]
    found = []
    for record, own in zip(same, trained, strict=True):
        others = [(each, differences(own, its)) for each, its in zip(same, trained, strict=True) if each is not record]
        named = ", ".join(f"{each.path.name} ({why or 'nor do their settings differ'})" for each, why in others)
        advice = "; a study=NAME of its own for one of them tells them apart" if any(why for _, why in others) else ""
        found.append(LeftOut(record.path, f"duplicated: the same cell and seed as {named}{advice}"))
    return found


def trained_alike(records: Sequence[Record]) -> tuple[list[Record], list[LeftOut]]:
    """The records that were trained as most of their table and of their cell were, and the others by name.

    The runs of a table share all settings but recipe, fine-tune and seed, those of a cell all but the seed, and all are
    of one RESULTS, one number of processes and the same data (Record.trained): numbers of others are never averaged.
    Where a table's rows are models, which bring their schedules, this is asked of the runs of one model. Where no
    settings are in the majority, all are left out: which are meant cannot be known.
    """
    of_table, of_cell, left_out = {}, {}, []
    for record in records:
        table = _table(record)
        settings = record.settings()
        model = record.row if record.row == settings.get("model.name") else None
        of_cells = OF_A_CELL if model is None else (*OF_A_CELL, "model")
        own = {key: value for key, value in settings.items() if key.partition(".")[0] in of_cells}
        rest = {key: value for key, value in settings.items() if key not in own and key != "seed"}
        of_table.setdefault((*table, model), []).append((record, rest | record.trained()))
        of_cell[id(record)] = (*table, record.row, record.column), own
    cells: dict[tuple, list[tuple[Record, dict]]] = {}
    for group in of_table.values():
        on_test = any(record.tested for record, _ in group)
        for record, settings in group:  # one that diverged never came to them
            settings["test data"] = on_test if record.diverged else record.tested
        for record, _ in _majority(group, "table", left_out):
            cell, own = of_cell[id(record)]
            cells.setdefault(cell, []).append((record, own))
    kept = [record for group in cells.values() for record, _ in _majority(group, "cell", left_out)]
    return kept, left_out


def _majority(group: list[tuple[Record, dict]], of: str, left_out: list[LeftOut]) -> list[tuple[Record, dict]]:
    """Those of a group that have the settings of most; the others are added to left_out."""
    counts = Counter(json.dumps(settings, sort_keys=True) for _, settings in group)
    (usual, count), *others = counts.most_common()
    tied = bool(others) and others[0][1] == count
    kept = []
    for record, settings in group:
        own = json.dumps(settings, sort_keys=True)
        if own == usual and not tied:
            kept.append((record, settings))
            continue
        other = json.loads(usual if own != usual else others[0][0])
        most = f"others of its {of}, and neither are most" if tied else f"most runs of its {of}"
        reason = f"trained in another way than {most}: {differences(settings, other)}"
        left_out.append(LeftOut(record.path, reason))
    return kept
