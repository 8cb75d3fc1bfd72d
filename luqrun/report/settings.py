"""Whether the runs of a table were trained alike: what its cells do not stand for must be the same in all of them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence

import yaml

from luqrun.config import flatten
from luqrun.report.records import LeftOut, Record
from luqrun.run_folder import NOT_IN_RESULT

VARIED = ("quant", "finetune", "seed", "model")  # what tables compare; a model brings its schedule


def of_one_kind(records: Sequence[Record]) -> tuple[list[Record], list[LeftOut]]:
    """The records whose settings most runs of their study and model have, and the others by name.

    Where no settings are in the majority, all are left out: which are meant cannot be known.
    """
    groups: dict[tuple, list[tuple[Record, dict]]] = {}
    for record in records:
        config = yaml.safe_load(record.config)
        model = (config.get("model") or {}).get("name") if isinstance(config.get("model"), dict) else None
        key = record.study, record.table, record.scale, json.dumps(model)
        groups.setdefault(key, []).append((record, flatten(_settings(config))))
    kept, left_out = [], []
    for group in groups.values():
        counts = Counter(json.dumps(settings, sort_keys=True) for _, settings in group)
        (usual, count), *others = counts.most_common()
        tied = bool(others) and others[0][1] == count
        for record, settings in group:
            if not tied and json.dumps(settings, sort_keys=True) == usual:
                kept.append(record)
            else:
                left_out.append(LeftOut(record.path, _reason(settings, json.loads(usual))))
    return kept, left_out


def _settings(config: dict) -> dict:
    values = {name: value for name, value in config.items() if name not in (*VARIED, *NOT_IN_RESULT[""])}
    for part, names in NOT_IN_RESULT.items():
        if part and isinstance(values.get(part), dict):
            values[part] = {name: value for name, value in values[part].items() if name not in names}
    return values


def _reason(own: dict, usual: dict) -> str:
    keys = [key for key in sorted(own.keys() | usual.keys()) if own.get(key) != usual.get(key)]
    if not keys:
        return "the runs of its table were trained in different ways, none of them in the majority"
    shown = ", ".join(f"{key}={own.get(key)} instead of {usual.get(key)}" for key in keys[:3])
    return f"trained in another way than most runs of its table: {shown}"
