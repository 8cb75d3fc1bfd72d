"""The page on hardware: what runs of job=cost found of several networks and recipes, and the multipliers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from luqrun.cost import gates
from luqrun.cost.job import DATA
from luqrun.cost.text import table
from luqrun.errors import UserError

TITLE = "Hardware: how much of a network is 4-bit, what it saves, and multipliers without multiplications"
EXPLAINED = """MACs: multiply-accumulates. 4-bit: share of fprop, dgrad and wgrad of all layers; of all matrix work,
products of activations included; and of layers, if grouped convolutions were in high precision. Two samples of a
gradient count once in the shares and twice in the bound. Kept: operands of GEMMs that the forward pass keeps. Moved:
operands read and results written once, without the pass that makes codes; a result is written in high precision, so
that this can be more than 1. Bound: Amdahl's, of all matrix work, over all of it in fp32, in bf16, and over the same
codes on 8-bit units. Seconds: of the count, without the start of the program, on a shared core; the first run of a kind
of network in a process also loads its libraries."""
NEEDED = ("model", "quant", "precision", "shares", "bytes", "bounds", "high_precision", "grouped", "seconds")


def read(folder: Path) -> list[dict]:
    """cost.json of every run under a folder, in the order of model and recipe in which they ran, without the GEMMs.

    Raises UserError where there is none, or one is damaged.
    """
    found = []
    for path in sorted(folder.rglob(DATA), key=lambda path: (path.stat().st_mtime, str(path))):
        try:
            record = json.loads(path.read_text())
            record = {name: value for name, value in record.items() if name != "gemms"}
            missing = [name for name in NEEDED if name not in record]
        except (ValueError, AttributeError):
            raise UserError(f"{path} is not what job=cost writes") from None
        if missing:
            raise UserError(f"{path} has no {missing[0]}: run job=cost again")
        found.append(record)
    if not found:
        raise UserError(f"{folder} holds no run of job=cost; luqrun -m +experiment=hardware/paper makes some")
    return found


def page(records: Sequence[dict], torch_counts: Sequence[dict], multiplier: dict, commands: Sequence[str]) -> str:
    """The page as Markdown. torch_counts: a row a network, of torch's counter and ours; multiplier: what was shown of
    it (luqrun.bench.mfbprop); commands: those that make the page."""
    made = "\n".join(["```", *commands, "```"])
    speeds = ", ".join(f"{key.removeprefix('speed_')} {value:g}" for key, value in records[0]["speeds"].items())
    parts = [
        f"# {TITLE}",
        "Counted from shapes by `luqrun job=cost`, on the meta device: nothing was trained or timed, and no data were "
        f"read. High precision is {records[0]['precision']}. This makes the page again:",
        made,
        "## Shares, bytes and bounds",
        f"{EXPLAINED} Speeds: {speeds} (NVIDIA's A100 as its data sheet has it, INT4 twice INT8, fp32 as TF32; keys "
        "cost.speed_*).",
        _networks(records),
        "## What stays in high precision",
        "Shares of all matrix work, by the reason. Normalisation, embeddings and the optimizer are no matrix products, "
        "and in high precision under every recipe; each run's cost.md lists them.",
        _reasons(records),
        _grouped(records),
        "## Agreement with torch's counter",
        "torch.utils.flop_counter on the same networks, without a recipe, forward and backward. It takes the weight's "
        "gradient of a convolution in G groups for that of a whole one, G times as much; there our count is compared "
        "as torch would have it.",
        _counts(torch_counts),
        "## Backpropagation without multiplications",
        _multiplier(multiplier),
        "## Gates",
        _gates(),
    ]
    return "\n\n".join(parts) + "\n"


def _networks(records: Sequence[dict]) -> str:
    head = (
        *("network", "recipe", "fprop MACs, an example", "4-bit, of layers", "of all matrix work", "without grouped"),
        *("kept, of fp32; bf16", "moved, of bf16"),
    )
    rows = []
    for record in records:
        shares, bytes_, bounds = record["shares"], record["bytes"], record["bounds"]
        kept = "; ".join(f"{_ratio(bytes_, 'kept', other)}" for other in ("fp32", "bf16"))
        rows.append(
            (
                *(record["model"], record["quant"], f"{record['fprop_macs_per_example']:,}"),
                *(_percent(shares[name]) for name in ("layers", "matrix", "without_grouped")),
                *(kept, _ratio(bytes_, "moved", "bf16")),
                "; ".join(_factor(bounds[name]) for name in ("fp32", "bf16", "8bit")),
                f"{record['seconds']:.1f}",
            )
        )
    return table((*head, "bound, over fp32; bf16; 8-bit", "seconds"), rows)


def _ratio(bytes_: dict, what: str, other: str) -> str:
    return f"{bytes_['recipe'][what] / bytes_[other][what]:.2f}" if bytes_[other][what] else "-"


def _factor(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _reasons(records: Sequence[dict]) -> str:
    of = [{row["why"]: row["share"] for row in record["high_precision"]} for record in records]
    # A recipe without quantizers leaves all of it, and says nothing here.
    shown = [(record, rows) for record, rows in zip(records, of, strict=True) if record["shares"]["matrix"]]
    names = list(dict.fromkeys(why for _, rows in shown for why in rows))
    rows = [(record["model"], record["quant"], *(_share(found, why) for why in names)) for record, found in shown]
    return table(("network", "recipe", *names), rows)


def _share(found: dict[str, float | None], why: str) -> str:
    if why not in found:
        return ""
    return "not known" if found[why] is None else _percent(found[why])


def _grouped(records: Sequence[dict]) -> str:
    seen, lines = set(), []
    for record in records:
        grouped = record["grouped"]
        if grouped["layers"] and record["model"] not in seen:
            seen.add(record["model"])
            fewest, most = grouped["terms"]
            terms = f"{fewest}" if fewest == most else f"{fewest} to {most}"
            lines.append(
                f"- {record['model']}: {grouped['layers']} grouped convolutions have {_percent(grouped['share'])} of "
                f"the MACs of layers, in sums of {terms} terms."
            )
    if not lines:
        return "None of these networks has grouped convolutions."
    about = (
        "Grouped convolutions are 4-bit too in luqrun, where a recipe does not skip them. A matrix unit sums more "
        "terms at a time than a group of few channels has, so that they may not gain what the bound says:"
    )
    return "\n".join([about, "", *lines])


def _counts(rows: Sequence[dict]) -> str:
    body = [
        (
            row["model"],
            *(f"{row[key]:,}" for key in ("forward", "torch_forward", "backward", "as_torch", "torch_backward")),
            "yes" if (row["forward"], row["as_torch"]) == (row["torch_forward"], row["torch_backward"]) else "**no**",
        )
        for row in rows
    ]
    head = "network", "forward, ours", "torch", "backward, ours", "ours as torch counts", "torch", "equal"
    return table(head, body)


def _multiplier(found: dict) -> str:
    signed, unsigned = found["signed"], found["unsigned"]
    lines = [
        f"- INT4 x FP4 [1,3,0] by table, addition of exponents and XOR of signs: all {signed['products']} pairs of "
        f"4-bit fields give the integer product: {_yes(signed['exact'])}. They fit FP7 [1,4,2].",
        f"- Unsigned activations (0 to 15): all {unsigned['products']} products in [1,4,3] are exact: "
        f"{_yes(unsigned['exact'])}. The paper's FP7 [1,4,2] does not hold them: {unsigned['do_not_fit']} of the "
        f"{unsigned['magnitudes']} magnitudes need a third fraction bit. So wgrad after a ReLU needs a wider type than "
        "the paper says.",
        f"- A GEMM of tables, additions and XOR alone equals the integer GEMM on {found['gemms']} random matrices: "
        f"{_yes(found['gemms_equal'])}.",
    ]
    for run in found["trained"]:
        lines.append(
            f"- `{run['command']}` with LUQRUN_KERNELS=mfbprop and without: {run['numbers']:,} numbers of the last "
            f"checkpoint's model are bit-identical: {_yes(run['identical'])} ({run['steps']} steps, "
            f"{run['seconds'][0]:.0f} s against {run['seconds'][1]:.0f} s; it is an emulation)."
        )
    return "\n".join(lines)


def _gates() -> str:
    prices = gates.PRICES
    parts = [
        "Our own count of logic, from the cells below: no wires, registers, timing or synthesis. Prices of a cell are "
        "stated: two-input gates as in textbooks, and two-input NANDs when a cell is made of nothing else.",
        table(
            ("cell", *prices),
            [(cell, *(f"{price[cell]}" for price in prices.values())) for cell in prices["gates"]],
        ),
    ]
    for block in gates.BLOCKS:
        rows = [
            (
                part.what,
                ", ".join(f"{count} {cell}" for cell, count in part.cells.items()) or "none",
                *(f"{gates.price(part.cells, price)}" for price in prices.values()),
            )
            for part in gates.BLOCKS[block]
        ]
        rows.append(("**total**", "", *(f"**{gates.total(block, price)}**" for price in prices.values())))
        parts += [f"### {block[0].upper()}{block[1:]}", table(("part", "cells", *prices), rows)]
    found = {name: gates.comparison(price) for name, price in prices.items()}
    rows = [
        ("standard block / multiplication-free", *(f"{each['ratio']:.2f}" for each in found.values())),
        ("the same, unsigned", *(f"{each['ratio, unsigned']:.2f}" for each in found.values())),
    ]
    for name in ("FP32", "FP16"):
        shrinks = [_percent(each[f"MAC with {name}"]) for each in found.values()]
        rows.append((f"a whole MAC with an {name} accumulator shrinks by", *shrinks))
    parts += [
        "### Compared",
        table(("", *prices), rows),
        f"The paper says about {gates.PAPER_RATIO} times (section 7). Its own table of gates was not available, and "
        "none of its numbers is used here. Ours clears the product of a zero operand in both blocks, which makes them "
        f"more alike: without that the ratio is {_without_zero():.1f} in gates.",
    ]
    return "\n\n".join(parts)


def _without_zero() -> float:
    prices = gates.PRICES["gates"]
    of_zero = [part for part in gates.BLOCKS["standard"] if part in gates.OF_ZERO]
    zero = sum(gates.price(part.cells, prices) for part in of_zero)
    return (gates.total("standard", prices) - zero) / (gates.total("multiplication-free", prices) - zero)


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _yes(fact: bool) -> str:
    return "yes" if fact else "**no**"
