"""The cost of a training step as a Markdown text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from luqrun.cost.gemms import Gemm
from luqrun.cost.totals import FREE

NAMES = {"fp32": "fp32", "bf16": "bf16", "8bit": "8-bit units"}


def markdown(record: dict, gemms: Sequence[Gemm]) -> str:
    """The text of a run. record: what cost.json holds (luqrun.cost.job)."""
    parts = [
        f"# {record['model']} under quant={record['quant']}: what a training step costs",
        f"{_plain(record['examples'], record['unit'])} a step: {record['about']}. High precision is "
        f"{record['precision']}. Counted from shapes in {record['seconds']:.1f} s; nothing was computed."
        f"{_micro(record)}",
        *_warnings(record),
        table(("", "value"), _totals(record)),
        "## What stays in high precision",
        table(("why", "GEMMs", "MACs a step", "of all matrix work"), _reasons(record)),
        _outside(record),
        "## Bound on the speed-up",
        _bounds(record),
        "## Layers and GEMMs",
        "Shape: groups x (rows x inner) x (inner x columns). Kept: what the forward pass keeps for this GEMM, in bits; "
        "what an earlier layer keeps is not kept again. MACs are those of one pass; x N: each of N samples of the "
        "gradient is a GEMM.",
        table(("layer", "GEMM", "shape", "MACs a step", "operands", "kept", "4 bits"), map(_row, gemms)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _totals(record: dict) -> list[tuple[str, str]]:
    shares, bytes_, bound = record["shares"], record["bytes"], record["bounds"]
    by_gemm = "; ".join(_percent(shares[name]) for name in ("fprop", "dgrad", "wgrad"))
    rows = [
        (f"MACs of fprop of all layers, {_one(record['unit'])}", f"{record['fprop_macs_per_example']:,}"),
        ("the same and products of activations", f"{record['forward_macs_per_example']:,}"),
        ("MACs of all GEMMs of layers, a step", f"{record['macs']['layers']:,}"),
        ("the same and products of activations", f"{record['macs']['matrix']:,}"),
        ("share at 4 bits, of all layers", _percent(shares["layers"])),
        ("share at 4 bits, of fprop; dgrad; wgrad", by_gemm),
        ("share at 4 bits, of all matrix work", _percent(shares["matrix"])),
        ("share at 4 bits without grouped convolutions", _percent(shares["without_grouped"])),
    ]
    for name, what in (("kept", "kept for the backward pass"), ("moved", "moved by the GEMMs")):
        ours, others = bytes_["recipe"][name], {each: bytes_[each][name] for each in ("fp32", "bf16")}
        beside = ", ".join(f"{ours / other:.3f} of {each}'s" for each, other in others.items() if other)
        rows.append((f"MiB {what}", f"{ours / 2**20:,.1f}" + (f" ({beside})" if beside else "")))
    rows.append(("MiB moved to make codes, as a pass of its own", f"{bytes_['recipe']['quantizing'] / 2**20:,.1f}"))
    found = [f"{_times(bound[name])} over {NAMES[name]}" for name in NAMES]
    return [*rows, ("bound on the speed-up of all matrix work", ", ".join(found))]


def _micro(record: dict) -> str:
    count = record["accumulate"]
    return f" The optimizer takes {count} such steps at a time (schedule.accumulate={count})." if count > 1 else ""


def _warnings(record: dict) -> list[str]:
    names = record["uncounted"]
    if not names:
        return []
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if names[5:] else "")
    who = "1 layer is of a kind" if len(names) == 1 else f"{len(names)} layers are of kinds"
    return [f"**{who} whose work is not known: {shown}. All shares, bytes and bounds are of the rest.**"]


def _reasons(record: dict) -> list[tuple[str, ...]]:
    found = []
    for row in record["high_precision"]:
        known = ("not known", "not known") if row["macs"] is None else (f"{row['macs']:,}", _percent(row["share"]))
        found.append((row["why"], f"{row['gemms']}", *known))
    return found or [("nothing", "0", "0", _percent(0.0))]


def _outside(record: dict) -> str:
    lines = ["No matrix products, and in high precision under every recipe:"]
    for kind, row in record["outside"].items():
        lines.append(
            f"- {kind}: {_plain(row['layers'], 'layer')}, {row['elements']:,} numbers a step, "
            f"{row['kept_bytes'] / 2**20:,.1f} MiB kept;"
        )
    optimizer = record["optimizer"]
    lines.append(
        f"- optimizer ({optimizer['name']}): {optimizer['parameters']:,} parameters in fp32, with "
        f"{optimizer['state_bytes'] / 2**20:,.1f} MiB of state, all of it read and written in each step."
    )
    grouped = record["grouped"]
    if grouped["layers"]:
        fewest, most = grouped["terms"]
        terms = f"{fewest} terms" if fewest == most else f"{fewest} to {most} terms"
        lines.append(
            f"\nGrouped convolutions ({_plain(grouped['layers'], 'layer')}) have {_percent(grouped['share'])} of the "
            f"MACs of layers; {_percent(grouped['share_4bit'])} of theirs are 4-bit. The sums of a group in fprop have "
            f"{terms}: few for a matrix unit, which the bound below does not know."
        )
    return "\n".join(lines)


def _bounds(record: dict) -> str:
    speeds, bound = record["speeds"], record["bounds"]
    shown = ", ".join(f"{name.removeprefix('speed_')} {value:g}" for name, value in speeds.items())
    limit = bound[FREE]
    limit = f"{limit:.2f}" if limit is not None else "any number of"
    found = ", ".join(f"{_times(bound[name])} over {NAMES[name]}" for name in NAMES)
    return (
        f"Speeds of matrix units: {shown} (keys cost.speed_*; the defaults are NVIDIA's A100, INT4 twice INT8, fp32 as "
        f"TF32). With these all matrix products together are at most {found}; if 4-bit products took no time, {limit} "
        f"times as fast as in {record['precision']}. What is no matrix product comes on top."
    )


def _row(gemm: Gemm) -> tuple[str, ...]:
    size = f"{gemm.rows} x {gemm.inner} x {gemm.columns}"
    shape = "not known" if gemm.kind == "unknown" else f"{gemm.groups} x {size}" if gemm.groups > 1 else size
    counted = "not known" if gemm.macs is None else f"{gemm.macs:,}" + (f" x {gemm.passes}" if gemm.passes > 1 else "")
    first, second = gemm.sides
    kept = f"{gemm.kept_bits:,.0f}" if gemm.kept_bits else "-"
    answer = {4: "yes", 8: "no: 8 bits", None: f"no: {gemm.why}"}[gemm.width]
    sides = f"{first.name} {first.format}, {second.name} {second.format}"
    if gemm.kind == "attention product":
        sides = f"{first.format} x {second.format}"
    return gemm.layer or "the model", gemm.gemm, shape, counted, sides, kept, answer


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _percent(value: float) -> str:
    return f"{100 * value:.2f} %"


def _times(value: float | None) -> str:
    return "not known" if value is None else f"{value:.2f} times"


def _plain(count: int, noun: str) -> str:
    first, *rest = noun.split(" ")
    return f"{count:,} " + (noun if count == 1 else " ".join([f"{first}s", *rest]))


def _one(unit: str) -> str:
    return f"{'an' if unit[0] in 'aeiou' else 'a'} {unit}"
