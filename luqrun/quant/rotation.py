"""Hadamard rotations of the two operands of a GEMM along its contraction, which leave their product as it is.

They spread outliers over the elements that share a scale. With random signs they are the randomized Hadamard transform
(Tseng et al., 2025; NVIDIA's NVFP4 recipe).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from luqrun.errors import UserError, check_choice
from luqrun.quant.grids import Lines
from luqrun.quant.kernels import ops
from luqrun.quant.kernels.layout import from_memory_order, in_memory_order, is_channels_last
from luqrun.quant.kernels.philox import EVALUATION_STEP, OPERAND, STEP, of_gemm

SIGNS = ("none", "fixed", "drawn")
SIZES = (2, 4, 8, 16, 32, 64, 128, 256)
NUMBER = 3  # of the signs in the names of draws, after the three operands


class Rotation(NamedTuple):
    """Hadamard transforms of groups of `size` elements. signs: none; fixed, the same in every layer and step; or drawn,
    new ones in each step, alike on all ranks."""

    size: int
    signs: str = "none"

    @classmethod
    def from_keys(cls, key: str, hadamard: object, signs: object) -> Rotation | None:
        """From quant.GEMM.hadamard and .signs (`key` names the GEMM); UserError for what they cannot be."""
        if hadamard is None:
            if signs is not None:
                raise UserError(f"{key}.signs={signs} is of a rotation: set {key}.hadamard too, such as 16")
            return None
        if type(hadamard) is not int or hadamard not in SIZES:
            raise UserError(f"{key}.hadamard={hadamard!r} is not allowed; allowed: {', '.join(map(str, SIZES))}, null")
        check_choice(f"{key}.signs", signs or "none", SIGNS)
        return cls(hadamard, signs or "none")

    def __str__(self):
        return f"hadamard {self.size}" + (f", signs {self.signs}" if self.signs != "none" else "")


def signs_of(rotation: Rotation, stream: Tensor, gemm: str) -> Tensor | None:
    """The signs, float32 (size,) of +-1, of a GEMM in the call whose weight's draw `stream` names."""
    if rotation.signs == "none":
        return None
    if rotation.signs == "fixed":
        own = torch.zeros_like(stream)  # a tensor of Python values would be a copy that the host waits for
        own[STEP] = EVALUATION_STEP
    else:
        own = of_gemm(stream, gemm)
    own[OPERAND] = NUMBER
    return ops.signs(own, rotation.size)


def rotate(x: Tensor, lines: Lines, rotation: Rotation, signs: Tensor | None) -> Tensor:
    """x as float32 with groups along `lines` rotated; what is left over at the end is rotated in smaller ones."""
    return ops.hadamard(x.detach(), lines.grid, lines.axis, rotation.size, signs)


def unrotate(x: Tensor, lines: Lines, rotation: Rotation, signs: Tensor | None) -> Tensor:
    """The inverse of `rotate`, to the rounding of float32."""
    turned = ops.hadamard(x, lines.grid, lines.axis, rotation.size, None)
    if signs is None:
        return turned
    along = signs.repeat(-(-lines.length // rotation.size))[: lines.length]
    flat = in_memory_order(turned).reshape(tuple(lines)) * along[:, None]
    return from_memory_order(flat.reshape(-1), turned.shape, is_channels_last(turned))
