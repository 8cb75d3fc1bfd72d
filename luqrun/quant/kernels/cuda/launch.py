"""How the Triton kernels are launched: what their torch sides share."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from luqrun.quant.kernels.layout import dense


def launch(kernel, programs: int, *arguments, **constants) -> None:
    """Launch a grid of programs on the device of the first argument. Fusing a * b + c would change its rounding."""
    with torch.cuda.device_of(arguments[0]):
        kernel[(programs,)](*arguments, **constants, enable_fp_fusion=False)


def native(x: Tensor) -> Tensor:
    """x, dense, in a type that the kernels read; float64 is rounded to float32, as the reference does."""
    x = dense(x.detach())
    return x.float() if x.dtype == torch.float64 else x


def pattern(value: float) -> int:
    """The bits of a float64: as a number, Triton would round it to float32."""
    return struct.unpack("<q", struct.pack("<d", value))[0]
