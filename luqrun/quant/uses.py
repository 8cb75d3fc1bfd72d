"""How a layer's three GEMMs take their operands, as far as its recipe says it: known once, asked in each forward."""

from __future__ import annotations

from typing import NamedTuple

from luqrun.quant.quantizer import Quantizer
from luqrun.quant.rotation import Rotation

SECOND = {"activation": "wgrad", "weight": "dgrad"}  # the GEMM after fprop that takes the operand


class Use(NamedTuple):
    """Of a weight or an activation: the quantizers and rotations of fprop and of the second GEMM that takes it.

    same: whether one quantization serves both GEMMs; requantizes: whether the second takes what fprop made of it;
    repeats: whether quantizing it again, for fprop or for both, gives the same; masks: whether fprop's trust mask is
    its.
    """

    first: Quantizer | None
    second: Quantizer | None
    gemm: str
    rotations: tuple[Rotation | None, Rotation | None]
    same: bool
    requantizes: bool
    repeats: dict[str, bool]
    masks: bool


class Uses(NamedTuple):
    """gradients_same: whether one quantization serves dgrad and wgrad. By GEMM, rotations: that of one of which
    anything is quantized; blocks: whether an operand is in blocks, which int8 does not hold."""

    activation: Use
    weight: Use
    gradients_same: bool
    rotations: dict[str, Rotation | None]
    blocks: dict[str, bool]


def uses_of(fprop: tuple, dgrad: tuple, wgrad: tuple) -> Uses:
    """Those of the three pairs of a recipe (recipe.GEMMS)."""
    gemms = {"fprop": fprop, "dgrad": dgrad, "wgrad": wgrad}
    quantized = {gemm: [each for each in pair.operands if each is not None] for gemm, pair in gemms.items()}
    rotations = {gemm: pair.hadamard if quantized[gemm] else None for gemm, pair in gemms.items()}
    blocks = {gemm: any(each.block is not None for each in found) for gemm, found in quantized.items()}

    def same(operand: str, *names: str) -> bool:
        """Whether two GEMMs can share one quantization of a tensor: all but the number of samples is the same."""
        first, second = (getattr(gemms[name], operand) for name in names)
        if any(rotations[name] is not None for name in names):
            return False
        if first is None or second is None:
            return first is second
        return first.encoding == second.encoding and not second.requantize and first.lies_alike

    def use(operand: str) -> Use:
        gemm = SECOND[operand]
        first, second = getattr(fprop, operand), getattr(gemms[gemm], operand)
        turned = rotations["fprop"], rotations[gemm]
        drawn = any(each is not None and each.signs == "drawn" for each in turned)
        repeats = [not drawn and each is not None and each.repeats for each in (first, second)]
        return Use(
            first=first,
            second=second,
            gemm=gemm,
            rotations=turned,
            same=same(operand, "fprop", gemm),
            requantizes=second is not None and second.requantize and first is not None,
            repeats={"fprop": repeats[0], "both": all(repeats)},
            masks=fprop.trust_mask and first is not None and first.range == "rms",
        )

    return Uses(use("activation"), use("weight"), same("gradient", "dgrad", "wgrad"), rotations, blocks)
