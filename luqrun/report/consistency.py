"""Whether the runs of a table were trained alike: what its cells do not stand for must be the same in all of them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence

from luqrun.report.records import LeftOut, Record, differences

OF_A_CELL = ("quant", "finetune")  # what all tables compare


def of_one_kind(records: Sequence[Record]) -> tuple[list[Record], list[LeftOut]]:
    """The records that were trained as most of their table and of their cell were, and the others by name.

    The runs of a table share all settings but recipe, fine-tune and seed, those of a cell all but the seed, and all are
    of one RESULTS: numbers of others are never averaged. Where a
    table's rows are models, which bring their schedules, this is asked of the runs of one model. Where no settings are
    in the majority, all are left out: which are meant cannot be known.
    """
    of_table, of_cell, left_out = {}, {}, []
    for record in records:
        table = record.study, record.table, record.scale
        settings = record.settings()
        model = record.row if record.row == settings.get("model.name") else None
        of_cells = OF_A_CELL if model is None else (*OF_A_CELL, "model")
        own = {key: value for key, value in settings.items() if key.partition(".")[0] in of_cells}
        rest = {key: value for key, value in settings.items() if key not in own and key != "seed"}
        rest["RESULTS"] = record.results
        of_table.setdefault((*table, model), []).append((record, rest))
        of_cell[id(record)] = (*table, record.row, record.column), own
    cells: dict[tuple, list[tuple[Record, dict]]] = {}
    for group in of_table.values():
        for record, _ in _usual(group, "table", left_out):
            cell, own = of_cell[id(record)]
            cells.setdefault(cell, []).append((record, own))
    kept = [record for group in cells.values() for record, _ in _usual(group, "cell", left_out)]
    return kept, left_out


def _usual(group: list[tuple[Record, dict]], of: str, left_out: list[LeftOut]) -> list[tuple[Record, dict]]:
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
