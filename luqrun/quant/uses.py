"""How a layer's three GEMMs take their operands, as far as its recipe says it: known once, asked in each forward."""

from __future__ import annotations

from typing import NamedTuple

import torch

from luqrun.quant.encoding import Encoding
from luqrun.quant.kernels import has_kernels
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
    anything is quantized; blocks: whether an operand is in blocks, which int8 does not hold. whole: the encodings of
    activations, weights and gradients, if each has one for all GEMMs, one scale and one sample, and depends on nothing
    but the tensor and, of a gradient, its draw; else None."""

    activation: Use
    weight: Use
    gradients_same: bool
    rotations: dict[str, Rotation | None]
    blocks: dict[str, bool]
    whole: tuple[Encoding, Encoding, Encoding] | None


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

    uses, gradients_same = (use("activation"), use("weight")), same("gradient", "dgrad", "wgrad")
    quantizers = fprop.activation, fprop.weight, dgrad.gradient, wgrad.gradient
    whole = gradients_same and all(each.same and not each.masks for each in uses)
    whole = whole and all(each is not None and _is_alone(each) for each in quantizers)
    whole = whole and all(each.first.repeats for each in uses)
    encodings = tuple(each.encoding for each in quantizers[:3]) if whole else None
    return Uses(*uses, gradients_same, rotations, blocks, encodings)


def _is_alone(quantizer: Quantizer) -> bool:
    """Whether it makes int8 codes, one draw, of a tensor by that tensor alone."""
    alone = quantizer.block is None and quantizer.samples == 1 and quantizer.range in ("absmax", "sawb")
    fits = quantizer.largest is None and quantizer.form.code_dtype == torch.int8
    return alone and fits and has_kernels(quantizer.form, quantizer.rounding)
