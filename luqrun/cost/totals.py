"""What the GEMMs of a step come to: shares at 4 bits, bytes, and a bound on the speed-up.

The bound is Amdahl's: a step takes at least what its matrix products take on units of stated speeds, one after the
other; whatever else a step does, moves or waits for comes on top, and is no shorter in 4 bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from luqrun.config import CostConfig
from luqrun.cost.gemms import BITS, Gemm
from luqrun.cost.products import ATTENTION, UNKNOWN

FREE = "with_free_4bit"  # the bound if 4-bit products took no time
OPTIMIZER_STATES = {"sgd": 1, "adamw": 2}  # float32 numbers a parameter, beside the weight itself


def macs(gemms: Iterable[Gemm]) -> int:
    """Multiply-accumulates, as far as they are known; each sample of a gradient counts once."""
    return sum(gemm.macs or 0 for gemm in gemms)


def share(part: int, of: int) -> float:
    """part / of; 0 of nothing."""
    return part / of if of else 0.0


def shares(gemms: Sequence[Gemm]) -> dict[str, float]:
    """Shares of multiply-accumulates. layers: of fprop, dgrad and wgrad of all layers, those of unknown kinds
    included; matrix: of these and the products of activations; fprop, dgrad, wgrad: of that GEMM of all layers;
    without_grouped: 4-bit ones that are no grouped convolution, of all layers."""
    layers = [gemm for gemm in gemms if gemm.kind != ATTENTION]
    at_4 = [gemm for gemm in layers if gemm.width == 4]
    found = {"layers": share(macs(at_4), macs(layers)), "matrix": share(macs(at_4), macs(gemms))}
    for name in ("fprop", "dgrad", "wgrad"):
        of = [gemm for gemm in layers if gemm.gemm == name]
        found[name] = share(macs(gemm for gemm in of if gemm.width == 4), macs(of))
    found["without_grouped"] = share(macs(gemm for gemm in at_4 if gemm.groups == 1), macs(layers))
    return found


def in_high_precision(gemms: Sequence[Gemm]) -> dict[str, tuple[int, int | None, float | None]]:
    """By reason, in falling order: (GEMMs, multiply-accumulates, share of all matrix work) in high precision. The last
    two are None where they are not known of a GEMM."""
    found: dict[str, list[Gemm]] = {}
    for gemm in gemms:
        if gemm.why:
            found.setdefault(gemm.why, []).append(gemm)
    rows = {}
    for why, part in found.items():
        known = all(gemm.macs is not None for gemm in part)
        rows[why] = (len(part), macs(part), share(macs(part), macs(gemms))) if known else (len(part), None, None)
    return dict(sorted(rows.items(), key=lambda row: -(row[1][1] or 0)))


def uncounted(gemms: Iterable[Gemm]) -> list[str]:
    """Layers of which not even the multiply-accumulates are known: all shares are of the rest."""
    return sorted({gemm.layer for gemm in gemms if gemm.kind == UNKNOWN and gemm.macs is None})


def seconds(gemms: Iterable[Gemm], cost: CostConfig, precision: str, narrow: int | None = None) -> float:
    """Time of all matrix products, in the unit of the speeds. narrow: the fewest bits that units take (None: 4); 8 runs
    4-bit codes on 8-bit units. All samples of a gradient are products of their own."""
    speeds = {4: cost.speed_4bit, 8: cost.speed_8bit, None: getattr(cost, f"speed_{precision}")}
    counts = dict.fromkeys(speeds, 0)
    for gemm in gemms:
        width = gemm.width if gemm.width is None or narrow is None else max(gemm.width, narrow)
        counts[width] += (gemm.macs or 0) * gemm.passes
    return sum(count / speeds[width] for width, count in counts.items())


def bounds(gemms: Sequence[Gemm], cost: CostConfig, precision: str) -> dict[str, float | None]:
    """How many times as fast the matrix products can be at most: than all of them in fp32, than all in bf16, and than
    the same recipe's on 8-bit units. with_free_4bit: than all of them in `precision`, if 4-bit products took no time;
    None where there would be nothing left."""
    here, all_of_it = seconds(gemms, cost, precision), float(macs(gemms))
    rest = seconds([gemm for gemm in gemms if gemm.width != 4], cost, precision)
    found = {name: all_of_it / getattr(cost, f"speed_{name}") / here if here else None for name in BITS}
    found["8bit"] = seconds(gemms, cost, precision, narrow=8) / here if here else None
    found[FREE] = all_of_it / getattr(cost, f"speed_{precision}") / rest if rest else None
    return found


def size(gemms: Iterable[Gemm]) -> dict[str, int]:
    """Bytes: kept for the backward pass, moved by the GEMMs, and moved to make their codes where that is a pass of its
    own."""
    rows = list(gemms)
    of = {"kept": "kept_bits", "moved": "moved_bits", "quantizing": "quantized_bits"}
    return {name: math.ceil(sum(getattr(gemm, key) for gemm in rows) / 8) for name, key in of.items()}
