"""job=cost: which share of a training step's matrix work is 4-bit under a recipe, what it keeps and moves, and how much
faster it can be at most. From shapes on the meta device: no data are read, and nothing is trained."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict

from luqrun.config import Config
from luqrun.cost import picture, totals
from luqrun.cost.gemms import BITS, Gemm, gemms_of
from luqrun.cost.products import ATTENTION, Work, observe
from luqrun.cost.text import markdown
from luqrun.errors import UserError
from luqrun.internals.of_torch import asks_for_values
from luqrun.quant.convert import high_precision_layers
from luqrun.quant.recipe import Recipe
from luqrun.runs.folder import RunFolder, now
from luqrun.runs.reading import SUMMARY
from luqrun.tasks import outline_task

log = logging.getLogger(__name__)

TEXT, DATA = "cost.md", "cost.json"


def run(config: Config, folder: RunFolder) -> dict:
    """Count, and write cost.md, cost.json, cost.svg and cost.png (with matplotlib) and summary.json.

    Raises UserError where shapes cannot be known without data.
    """
    started = time.perf_counter()
    folder.update_run(device="meta")
    record, gemms = count(config)
    record["seconds"] = round(time.perf_counter() - started, 2)
    folder.write_text(TEXT, markdown(record, gemms))
    folder.write_text(DATA, json.dumps({**record, "gemms": [asdict(gemm) for gemm in gemms]}, indent=1) + "\n")
    try:
        picture.draw(gemms, f"{record['model']}, quant={record['quant']}, {record['about']}", folder.path)
    except ModuleNotFoundError:
        log.warning("there is no picture: it needs matplotlib (pip install 'luqrun[plot]')")
    summary = summary_of(record)
    folder.update_run(status="finished", end=now())
    folder.write_json(SUMMARY, summary)
    return summary


def count(config: Config) -> tuple[dict, list[Gemm]]:
    """What cost.json holds of a run, but for the seconds, and its GEMMs."""
    outline, recipe = outline_task(config), Recipe.from_config(config.quant)
    high = high_precision_layers(outline.network, recipe, example=outline.example)
    try:
        work = observe(outline.network, outline.inputs)
    except (RuntimeError, TypeError) as error:
        if not asks_for_values(error):
            raise
        why = " ".join(str(error).split())[:100]
        raise UserError(f"model.name={config.model.name}: its shapes cannot be known without data ({why})") from error
    gemms = gemms_of(work.products, recipe, high, config.precision)
    # What the same step takes without a recipe, in either precision.
    everything = dict.fromkeys({product.layer for product in work.products}, "without a recipe")
    plain = {name: gemms_of(work.products, Recipe("none"), everything, name) for name in BITS}
    layers = [gemm for gemm in gemms if gemm.kind != ATTENTION]
    forward = totals.macs(gemm for gemm in layers if gemm.gemm == "fprop")
    with_attention = totals.macs(gemm for gemm in gemms if gemm.gemm == "fprop")
    record = {
        "model": config.model.name,
        "dataset": config.dataset.name,
        "quant": config.quant.name,
        "recipe": str(recipe),
        "skip": list(recipe.skip),
        "precision": config.precision,
        "about": outline.about,
        "unit": outline.unit,
        "examples": outline.examples,
        "accumulate": config.schedule.accumulate,
        "fprop_macs_per_example": _whole(forward, outline.examples),
        "forward_macs_per_example": _whole(with_attention, outline.examples),
        "macs": {"fprop": forward, "layers": totals.macs(layers), "matrix": totals.macs(gemms)},
        "shares": totals.shares(gemms),
        "high_precision": [
            {"why": why, "gemms": number, "macs": macs, "share": share}
            for why, (number, macs, share) in totals.in_high_precision(gemms).items()
        ],
        "uncounted": totals.uncounted(gemms),
        "grouped": _grouped(layers),
        "outside": _outside(work, BITS[config.precision]),
        "optimizer": _optimizer(config, outline.network),
        "bytes": {"recipe": totals.size(gemms), **{name: totals.size(each) for name, each in plain.items()}},
        "speeds": {key: value for key, value in vars(config.cost).items() if key.startswith("speed_")},
        "bounds": totals.bounds(gemms, config.cost, config.precision),
    }
    return record, gemms


def summary_of(record: dict) -> dict:
    """summary.json: shares from 0 to 1, bytes of a step (a batch), bounds as factors."""
    numbers = {
        **{name: record[name] for name in ("fprop_macs_per_example", "forward_macs_per_example")},
        "share_of_macs_4bit": record["shares"]["layers"],
        "share_of_matrix_work_4bit": record["shares"]["matrix"],
        "share_of_macs_4bit_without_grouped": record["shares"]["without_grouped"],
        "macs_per_step": record["macs"]["layers"],
        "matrix_macs_per_step": record["macs"]["matrix"],
        **{f"bytes_{what}": number for what, number in record["bytes"]["recipe"].items()},
        **{f"bytes_{what}_{of}": record["bytes"][of][what] for of in BITS for what in ("kept", "moved")},
        **{f"bound_{name if name == totals.FREE else f'over_{name}'}": each for name, each in record["bounds"].items()},
        "layers_of_unknown_work": len(record["uncounted"]),
        "seconds": record["seconds"],
    }
    return {f"cost/{name}": value for name, value in numbers.items()}


def _whole(macs: int, examples: int) -> int | float:
    """Of one example: a whole number, unless examples share work."""
    return macs // examples if macs % examples == 0 else macs / examples


def _grouped(layers: Sequence[Gemm]) -> dict:
    """Of grouped convolutions: how many there are, their share of the MACs of layers, which share of theirs is 4-bit,
    and how few and how many terms their sums have in fprop."""
    found = [gemm for gemm in layers if gemm.groups > 1]
    forward = [gemm for gemm in found if gemm.gemm == "fprop"]
    terms = [gemm.inner for gemm in forward]
    return {
        "layers": len(forward),
        "share": totals.share(totals.macs(found), totals.macs(layers)),
        "share_4bit": totals.share(totals.macs(gemm for gemm in found if gemm.width == 4), totals.macs(found)),
        "terms": [min(terms, default=0), max(terms, default=0)],
    }


def _outside(work: Work, bits: int) -> dict:
    found: dict[str, dict[str, int]] = {}
    for each in work.outside:
        row = found.setdefault(each.kind, {"layers": 0, "elements": 0, "kept_bytes": 0})
        row["layers"] += 1
        row["elements"] += each.elements
        row["kept_bytes"] += each.kept * bits // 8
    return found


def _optimizer(config: Config, network) -> dict:
    schedule = config.schedule
    states = totals.OPTIMIZER_STATES[schedule.optimizer] if schedule.optimizer != "sgd" or schedule.momentum else 0
    parameters = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
    return {"name": schedule.optimizer, "parameters": parameters, "state_bytes": 4 * states * parameters}
