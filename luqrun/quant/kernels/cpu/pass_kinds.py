"""Which layers make each pass in one call (`passes`), and whether that is known to be the fastest way."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from luqrun.quant.encoding import Encoding
from luqrun.quant.kernels.cpu import int8, int8_tiles, int8_tiles_wgrad, int8_winograd
from luqrun.quant.kernels.cpu.int8_tiles import Pairs

MOST = 1 << 22  # elements of a tensor: with more of them, Python takes no time worth saving
# Products of a linear layer's weight gradient up to which blocks make it, on one thread; a library makes larger ones.
FEW_PRODUCTS = 1 << 19


class Kind(NamedTuple):
    """What layers have in common whose passes are one `LayerPass`.

    x, w: shapes; geometry: stride, padding, dilation of a convolution, or None; encodings: of x, w and the gradient.
    """

    x: tuple[int, ...]
    x_dtype: torch.dtype
    w: tuple[int, ...]
    w_dtype: torch.dtype
    geometry: Pairs | None
    groups: int
    encodings: tuple[Encoding, Encoding, Encoding]


class Shapes(NamedTuple):
    """Of a convolution, or a linear layer as the one of (rows, features, 1, 1). geometry: kernel, stride, padding,
    dilation."""

    a: tuple[int, ...]
    w: tuple[int, ...]
    out: tuple[int, ...]
    geometry: Pairs
    groups: int
    linear: bool

    @classmethod
    def of(cls, kind: Kind) -> Shapes:
        if kind.geometry is None:
            a, w, geometry = (math.prod(kind.x[:-1]), kind.x[-1], 1, 1), (*kind.w, 1, 1), int8.POINTWISE
        else:
            a, w, geometry = kind.x, kind.w, (kind.w[2:], *kind.geometry)
        out = a[0], w[0], *itertools.starmap(int8.out_size, zip(a[2:], *geometry, strict=True))
        return cls(a, w, out, geometry, kind.groups, kind.geometry is None)

    def elements(self) -> tuple[int, int, int]:
        """Of a, w and out."""
        a, w, out = map(math.prod, (self.a, self.w, self.out))
        return a, w, out

    def adds_in_library(self) -> bool:
        """Whether a library makes the weight gradient."""
        return self.linear and math.prod((self.a[0], *self.w)) > FEW_PRODUCTS

    def for_wgrad(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Those of g and a in blocks, where the rows of a linear layer are the pixels of one image."""
        a, out = self.a, self.out
        return ((1, out[1], out[0], 1), (1, a[1], a[0], 1)) if self.linear else (out, a)

    def suits(self) -> bool:
        """Whether this is for one call: tensors are not large, and blocks of ours can make the GEMMs."""
        if min(*self.a, *self.w, *self.out) < 1 or max(self.elements()) > MOST:
            return False
        forward = int8_tiles.suits(self.a, self.geometry, self.out[2:])
        backward = int8_tiles.suits_dgrad(self.out, self.geometry, self.a)
        if self.adds_in_library():
            return forward and backward and self.a[0] <= int8.CHUNK_ROWS
        g, a = self.for_wgrad()
        return forward and backward and int8_tiles_wgrad.suits(g, 1, a, self.geometry[0], self.groups)

    def are_fastest(self, dtype: torch.dtype) -> bool | None:
        """Whether blocks of ours are the fastest way to make the GEMMs, with results of `dtype`; None where the
        operators have not found that out yet."""
        if self.groups > 1:  # libraries have none
            return True
        asked = self._fprop(dtype), self._dgrad(dtype), () if self.linear else self._wgrad()
        found = [{int8.prefers_blocks(*each) for each in kinds} for kinds in asked if kinds]
        if any(False in each for each in found):
            return False
        return True if all(True in each for each in found) else None

    def _fprop(self, dtype: torch.dtype) -> list[tuple]:
        """What int8.prefers_blocks is asked, for codes without and with a sign."""
        (outputs, inputs, *_), strides = self.w, []
        winograd = not self.linear and self._has_winograd(inputs, outputs, self.out)
        if self.linear:
            strides = [int8.linear_strides(self.w)[0]]
        rest = [(outputs, *strides, dtype, signed) for signed in (False, True)]
        return [("fprop", self.a, self.geometry, each, winograd) for each in rest]

    def _dgrad(self, dtype: torch.dtype) -> list[tuple]:
        """As _fprop."""
        outputs, inputs, *_ = self.w
        if self.linear:
            adjoint = int8.linear_strides(self.w)[1]
            rest = [(inputs, adjoint, dtype, signed) for signed in (False, True)]
            return [("fprop", self.out, self.geometry, each, False) for each in rest]
        winograd = self._has_winograd(outputs, inputs, self.a)
        return [("dgrad", self.out, self.geometry, (inputs, dtype, signed), winograd) for signed in (False, True)]

    def _wgrad(self) -> list[tuple]:
        """As _fprop, whatever the sign."""
        outputs, inputs, *_ = self.w
        return [("wgrad", self.a, self.geometry, (outputs, 1), self._has_winograd(inputs, outputs, self.out))]

    def _has_winograd(self, inputs: int, outputs: int, images: Sequence[int]) -> bool:
        """images: of the shape in which the pixels are that are computed, or added up."""
        pixels = images[0] * images[2] * images[3]
        return int8_winograd.suits(self.geometry, inputs, outputs, pixels)
