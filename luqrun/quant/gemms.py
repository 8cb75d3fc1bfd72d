"""The GEMMs of linear layers and convolutions: in floating point, and in integers where the units are faster.

fprop: a x w; dgrad: g x w; wgrad: g x a. The floating-point ones take what torch's take. The integer ones take int8
codes and a scale, sum in int32 and round once: on a CPU with VNNI (`use_int8`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from luqrun.internals.of_torch import is_watched
from luqrun.quant import kernels
from luqrun.quant.encoding import Encoding
from luqrun.quant.grids import Grid, Lines, grid_of
from luqrun.quant.kernels import backend_for, ops
from luqrun.quant.kernels.cpu import int8, int8_library
from luqrun.quant.kernels.layout import dense, empty, is_channels_last

if TYPE_CHECKING:
    from luqrun.quant.kernels.cpu.passes import LayerPass

    Encodings = tuple[Encoding, Encoding, Encoding]

ONE, NONE = (1, 1), (0, 0)
# Of a strided 1x1 convolution with fewer input channels oneDNN's weight gradient writes beyond its memory (its issue
# 6035, oneDNN 3.12): the pixels that count are taken first.
FEW_CHANNELS = 16
LONGEST = int8.CHUNK_ROWS  # terms of a sum that int32 holds whatever the int8 codes


_int8_devices: dict[str, bool] = {}  # see kernels._fuses


def use_int8(device_type: str) -> bool:
    """Whether GEMMs on two operands of codes run on int8 units."""
    if device_type not in _int8_devices:
        numba = device_type == "cpu" and backend_for("cpu").__name__ == kernels.MODULES["cpu"]
        _int8_devices[device_type] = numba and int8.is_fast()
    return _int8_devices[device_type]


def describe(device_type: str, encodings: Iterable[Encoding] = ()) -> str:
    """What the log and run.json say: the kernels that serve this device type, the units that multiply codes, and
    which of `encodings` have others."""
    units, exceptions = "floating point", []
    if use_int8(device_type):
        units = "int8" if int8_library.has_direct_conv() else "int8, without oneDNN's convolution (slower)"
    for how in encodings:
        name, blocks = how.form.name, how.block is not None
        known = kernels.has_block_kernels(device_type, how) if blocks else kernels.has_kernels(how.form, how.rounding)
        if not known:
            exceptions.append(f"{name} quantized in torch operations")
        if use_int8(device_type) and (blocks or how.form.code_dtype != torch.int8):
            exceptions.append(f"GEMMs with {name} in floating point")
    return ", ".join([kernels.describe(device_type), f"GEMMs in {units}", *dict.fromkeys(exceptions)])


class _Contractions:
    """Where the contraction of each GEMM lies in its operands, for blocks and rotations along it.

    laid_out: a tensor in memory that can be read so. lines, grid: of one in this shape and memory format.
    """

    def grid(self, gemm: str, operand: str, shape: Sequence[int], channels_last: bool, how: Encoding) -> Grid:
        """Where an encoding's blocks lie in an operand of a GEMM: along its contraction, or as tiles."""
        if how.tile is not None:
            return Grid(self._tiled(operand, shape), how.tile)
        return grid_of(how, self.lines(gemm, operand, shape, channels_last))


@dataclass(frozen=True)
class LinearOp(_Contractions):
    """a (..., in) and w (out, in) -> (..., out). signed, in the integer GEMMs: whether a's or g's codes have a sign."""

    groups: ClassVar[int] = 1

    def laid_out(self, x: Tensor, how: Encoding | None) -> Tensor:
        return x.contiguous()

    def lines(self, gemm: str, operand: str, shape: Sequence[int], channels_last: bool) -> Lines:
        """Inputs in fprop, outputs in dgrad, and in wgrad the rows of the batch."""
        rows, features = math.prod(shape[:-1]), shape[-1]
        return (
            Lines(1, rows, features)
            if gemm == "wgrad" or (gemm, operand) == ("dgrad", "weight")
            else Lines(rows, features, 1)
        )

    def _tiled(self, operand: str, shape: Sequence[int]) -> tuple[int, int, int, int]:
        return 1, math.prod(shape[:-1]), 1, shape[-1]

    def fprop(self, a: Tensor, w: Tensor) -> Tensor:
        return F.linear(a, w)

    def dgrad(self, g: Tensor, w: Tensor, a_shape: Sequence[int], exact: bool = False) -> Tensor:
        return g @ w

    def wgrad(self, g: Tensor, a: Tensor, w_shape: Sequence[int]) -> Tensor:
        return _rows(g).t() @ _rows(a)

    def int8_pays(self, w_shape: Sequence[int], dtype: torch.dtype = torch.float32) -> tuple[bool, bool, bool]:
        """Of fprop, dgrad and wgrad, with results of `dtype`: whether the integer one is to be taken."""
        return w_shape[1] <= LONGEST, w_shape[0] <= LONGEST, True

    def layer_pass(self, a: Tensor, w: Tensor, encodings: Encodings, only_small: bool) -> LayerPass | None:
        """See cpu.passes.layer_pass; where `use_int8`."""
        return backend_for("cpu").layer_pass(a, w, None, 1, encodings, only_small)

    def int8_fprop(self, a: Tensor, w: Tensor, scale: Tensor, dtype: torch.dtype, signed: Tensor) -> Tensor:
        if a.shape[-1] != w.shape[1]:
            return self.fprop(a.float(), w.float())  # which says so
        return ops.int8_linear(a, w, scale, dtype, signed, False)

    def int8_dgrad(
        self, g: Tensor, w: Tensor, scale: Tensor, dtype: torch.dtype, signed: Tensor, a_shape: Sequence[int]
    ) -> Tensor:
        return ops.int8_linear(g, w, scale, dtype, signed, True)

    def int8_wgrad(self, grads: Sequence[Tensor], a: Tensor, w_shape: Sequence[int]) -> Tensor:
        return ops.int8_linear_wgrad(grads, a)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])  # -1 would be ambiguous without elements


@dataclass(frozen=True)
class ConvOp(_Contractions):
    """a (N, C, H, W) and w (K, C / groups, R, S) -> (N, K, H', W')."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    def laid_out(self, x: Tensor, how: Encoding | None) -> Tensor:
        tiled = how is not None and how.tile is not None
        return x.contiguous(memory_format=torch.channels_last) if tiled else dense(x)

    def lines(self, gemm: str, operand: str, shape: Sequence[int], channels_last: bool) -> Lines:
        """Input channels in fprop and output channels in dgrad, of a group, at each tap or pixel; in wgrad the images
        of the batch at each pixel: then every tap sees whole blocks."""
        first, second, *area = shape
        pixels, groups = math.prod(area), self.groups
        if gemm == "wgrad":
            return Lines(1, first, second * pixels)
        if operand == "weight":
            if gemm == "dgrad":
                return Lines(groups, first // groups, second * pixels)
            return Lines(first * pixels, second, 1) if channels_last else Lines(first, second, pixels)
        channels = second // groups
        if channels_last:
            return Lines(first * pixels * groups, channels, 1)
        return Lines(first * groups, channels, pixels)

    def _tiled(self, operand: str, shape: Sequence[int]) -> tuple[int, int, int, int]:
        """In channels_last memory: output by input channels at each tap, or images by channels at each pixel."""
        first, second, *area = shape
        if operand == "weight":
            return self.groups, first // self.groups, math.prod(area), second
        return 1, first, math.prod(area) * self.groups, second // self.groups

    def fprop(self, a: Tensor, w: Tensor) -> Tensor:
        return F.conv2d(a, w, None, self.stride, self.padding, self.dilation, self.groups)

    def dgrad(self, g: Tensor, w: Tensor, a_shape: Sequence[int], exact: bool = False) -> Tensor:
        """exact: g and w are codes, of which any algorithm makes the same sums."""
        if exact and g.is_cpu and self.groups > 1:  # where it takes less time, by up to four fifths
            how = self.stride, self.padding, self.dilation, False, NONE, self.groups
            a = empty(a_shape, _format(g, w), g.dtype, g.device)  # only its shape counts
            return torch.ops.aten.convolution_backward(g, a, w, None, *how, (True, False, False))[0]
        ends = zip(a_shape[2:], g.shape[2:], w.shape[2:], self.stride, self.padding, self.dilation, strict=True)
        left_over = [
            size - ((out - 1) * stride - 2 * padding + dilation * (kernel - 1) + 1)
            for size, out, kernel, stride, padding, dilation in ends
        ]
        return F.conv_transpose2d(g, w, None, self.stride, self.padding, left_over, self.groups, self.dilation)

    def wgrad(self, g: Tensor, a: Tensor, w_shape: Sequence[int]) -> Tensor:
        stride, padding = self.stride, self.padding
        if g.is_cpu and tuple(w_shape[2:]) == ONE and stride != ONE and w_shape[1] < FEW_CHANNELS:
            (high, wide), (height, width) = padding, g.shape[2:]
            a = F.pad(a, (wide, wide, high, high))[:, :, :: stride[0], :: stride[1]][:, :, :height, :width]
            stride, padding = ONE, NONE
        # Of the weight only the shape counts; without memory of its own it would be copied into some.
        w = empty(w_shape, _format(a, g), g.dtype, g.device)
        how = stride, padding, self.dilation, False, NONE, self.groups
        return torch.ops.aten.convolution_backward(g, a, w, None, *how, (False, True, False))[1]

    def int8_pays(self, w_shape: Sequence[int], dtype: torch.dtype = torch.float32) -> tuple[bool, bool, bool]:
        """Of fprop, dgrad and wgrad, with results of `dtype`: whether the integer one is to be taken, or tried where
        there are groups: then it must round as the floating-point one."""
        out_channels, in_channels, *kernel = w_shape
        taps = kernel[0] * kernel[1]
        taken = self.groups == 1
        if not taken and dtype == torch.float32 and not is_watched():
            taken = int8.suits_groups(self.groups, in_channels * self.groups, out_channels)
        return taken and in_channels * taps <= LONGEST, taken and out_channels * taps <= LONGEST, taken

    def layer_pass(self, a: Tensor, w: Tensor, encodings: Encodings, only_small: bool) -> LayerPass | None:
        """See LinearOp.layer_pass."""
        geometry = self.stride, self.padding, self.dilation
        return backend_for("cpu").layer_pass(a, w, geometry, self.groups, encodings, only_small)

    def int8_fprop(self, a: Tensor, w: Tensor, scale: Tensor, dtype: torch.dtype, signed: Tensor) -> Tensor:
        (height, width), (rows, columns) = a.shape[2:], w.shape[2:]
        too_low = height + 2 * self.padding[0] <= self.dilation[0] * (rows - 1)
        too_narrow = width + 2 * self.padding[1] <= self.dilation[1] * (columns - 1)
        if too_low or too_narrow or a.shape[1] != w.shape[1] * self.groups:
            return self.fprop(a.float(), w.float())  # which says so
        how = self.stride, self.padding, self.dilation, dtype, _format(a, w), signed, self.groups
        return ops.int8_conv(a, w, scale, *how)

    def int8_dgrad(
        self, g: Tensor, w: Tensor, scale: Tensor, dtype: torch.dtype, signed: Tensor, a_shape: Sequence[int]
    ) -> Tensor:
        how = self.stride, self.padding, self.dilation, dtype, _format(g, w), signed, self.groups
        return ops.int8_conv_dgrad(g, w, scale, a_shape, *how)

    def int8_wgrad(self, grads: Sequence[Tensor], a: Tensor, w_shape: Sequence[int]) -> Tensor:
        how = self.stride, self.padding, self.dilation, self.groups
        return ops.int8_conv_wgrad(grads, a, w_shape[2:], *how)


def _format(x: Tensor, w: Tensor) -> bool:
    """Whether torch's convolution of x and w comes out channels_last."""
    return is_channels_last(x) or is_channels_last(w)
