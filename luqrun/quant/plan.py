"""What one call of a layer does: which quantizer makes which operand of which GEMM, with which draws."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from luqrun.quant.kernels.layout import is_channels_last
from luqrun.quant.kernels.philox import of_gemm
from luqrun.quant.operands import EXACT, Operand, Stored, held_by
from luqrun.quant.quantizer import QuantizedTensor, Quantizer, health
from luqrun.quant.recipe import Dgrad, Fprop, Wgrad
from luqrun.quant.sharing import made_once

MAX_INT8_DRAWS = 2  # more int8 GEMMs than this cost more than one in floating point


@dataclass
class Plan:
    """What one call of a layer does: the quantizers of its GEMMs (None: high precision), draws and memory.

    streams: by operand, the int64 (6,) names of the draws. hindsight: by operand, the 0-dim maxima; observe is told
    the new ones and is None where they must not change. health: by operand, filled where it is a dict. keep: whether
    a backward pass may follow. reader: names the layer (luqrun.quant.sharing). share: what makes a tensor's statistics
    those of all processes (Quantizer.measure), for operands that are not the same in all of them.
    """

    fprop: Fprop
    dgrad: Dgrad
    wgrad: Wgrad
    streams: dict[str, Tensor]
    hindsight: dict[str, Tensor]
    observe: Callable[[str, Tensor], None] | None = None
    health: dict | None = None
    keep: bool = True
    reader: int = 0
    share: Callable[[Tensor], Tensor] | None = None

    def quantize(
        self, operand: str, x: Tensor, quantizer: Quantizer | None, dtype: torch.dtype, packed: bool = False
    ) -> tuple[Operand, Stored]:
        """x as an Operand with one draw of codes of `dtype` (or float32 where that cannot hold them), and as what is
        kept of it with `packed`, for the first GEMM that quantizes it."""
        if quantizer is None:
            return Operand((x,)), Stored((x,))
        first, stored, maximum = self._encode(operand, x, quantizer, self.streams[operand], dtype, packed)
        if operand in self.hindsight and self.observe is not None and x.numel():
            self.observe(operand, maximum)
        if self.health is not None:
            self.health[operand] = health(x, QuantizedTensor(first.codes, first.scale, first.signed, quantizer.form))
        return first, stored

    def quantize_once_more(
        self, gemm: str, operand: str, x: Tensor, quantizer: Quantizer | None, dtype: torch.dtype, packed: bool = False
    ) -> tuple[Operand, Stored]:
        """`quantize`, for a second GEMM that does it in another way: with a draw of its own."""
        if quantizer is None:
            return Operand((x,)), Stored((x,))
        stream = self.streams[operand]
        stream = of_gemm(stream, gemm) if quantizer.is_stochastic else stream
        return self._encode(operand, x, quantizer, stream, dtype, packed)[:2]

    def _encode(self, operand, x, quantizer, stream, dtype, packed) -> tuple[Operand, Stored, Tensor]:
        share = None if operand == "weight" else self.share
        dtype = held_by(quantizer.form, dtype)
        codes, scale, signed, fields, maximum = quantizer.run(
            x, stream, self.hindsight.get(operand), dtype, packed, share
        )
        stored = Stored((fields, scale, signed), quantizer.form, x.shape, is_channels_last(x))
        return Operand((codes,), scale, signed), stored, maximum

    def quantize_forward(
        self, operand: str, x: Tensor, gemms: dict[str, Quantizer | None], dtype: torch.dtype, keep: bool
    ) -> tuple[Operand, Stored]:
        """x for fprop, and with `keep` what the backward pass takes of it for the other of its two `gemms`.

        Where several layers read one activation, the first of them quantizes it for all.
        """
        first, second = gemms.values()
        alone = self.share is not None or self.health is not None  # what belongs to this layer is done in it
        needed = (first, second) if keep else (first,)
        if operand == "activation" and not alone and all(each is not None and each.repeats for each in needed):
            key = (first, second, dtype, keep)
            return made_once(x, key, self.reader, lambda: self._quantize_forward(operand, x, gemms, dtype, keep))
        return self._quantize_forward(operand, x, gemms, dtype, keep)

    def _quantize_forward(
        self, operand: str, x: Tensor, gemms: dict[str, Quantizer | None], dtype: torch.dtype, keep: bool
    ) -> tuple[Operand, Stored]:
        (_, first), (gemm, second) = gemms.items()
        same = in_same_codes(first, second)
        if first is None and second is not None and keep:
            return Operand((x,)), self.quantize(operand, x, second, dtype, packed=True)[1]
        other = None
        if keep and not same:  # before the first, which may change what a hindsight range remembers
            other = self.quantize_once_more(gemm, operand, x, second, dtype, packed=True)[1]
        found, stored = self.quantize(operand, x, first, dtype, packed=keep and same)
        return found, other or stored

    def quantize_gradient(self, g: Tensor, dtype: torch.dtype) -> tuple[Operand, Operand]:
        """The gradient for dgrad and for wgrad; the same object where one serves both.

        With N samples an operand is the sum of N draws' codes, its scale divided by N: one GEMM gives the average of
        the N products (SMP). The first draw serves both GEMMs where they encode alike.
        """
        if self.health is not None:
            self.health["gradient_exponents"] = exponent_counts(g)
        for_dgrad, for_wgrad = self.dgrad.gradient, self.wgrad.gradient
        apart, other = for_dgrad is not None and not in_same_codes(for_dgrad, for_wgrad), None
        if apart:  # before the first, which may change what a hindsight range remembers
            other, _ = self.quantize_once_more("wgrad", "gradient", g, for_wgrad, dtype)
        one, _ = self.quantize("gradient", g, for_dgrad or for_wgrad, dtype)
        if apart:
            return self._average(g, for_dgrad, one), self._average(g, for_wgrad, other, "wgrad")
        if in_same_codes(for_dgrad, for_wgrad):
            first = self._average(g, for_dgrad, one)
            alike = for_dgrad is None or for_dgrad.samples == for_wgrad.samples
            return first, first if alike else self._average(g, for_wgrad, one)
        return Operand((g,)), self._average(g, for_wgrad, one)

    def _average(self, g: Tensor, quantizer: Quantizer | None, one: Operand, gemm: str | None = None) -> Operand:
        """`one` and the further samples of the quantizer; gemm: whose draws are its own."""
        if quantizer is None or quantizer.samples == 1:
            return one
        (total,), scale, signed = one
        stream = self.streams["gradient"] if gemm is None else of_gemm(self.streams["gradient"], gemm)
        limit = quantizer.samples * max(quantizer.form.limit, quantizer.form.unsigned_limit)
        further = (
            quantizer.encode(g, scale, signed, stream, sample, total.dtype) for sample in range(1, quantizer.samples)
        )
        if total.dtype == torch.int8 and limit > EXACT[torch.int8] and quantizer.samples <= MAX_INT8_DRAWS:
            draws = total, *further
        else:
            total = total.to(total.dtype if limit <= EXACT[total.dtype] else torch.float32, copy=True)
            for codes in further:
                total += codes
            draws = (total,)
        return Operand(draws, scale / quantizer.samples, signed)


def in_same_codes(first: Quantizer | None, second: Quantizer | None) -> bool:
    """Whether two GEMMs can share one quantization of a tensor: all but the number of samples is the same."""
    if first is None or second is None:
        return first is second
    return first.encoding == second.encoding


def exponent_counts(x: Tensor) -> Tensor:
    """How many elements of x have each float32 exponent: int64 (256,), bin e for 2^(e - 127) <= |x| < 2^(e - 126)."""
    exponents = (x.detach().float().reshape(-1).contiguous().view(torch.int32) >> 23) & 0xFF
    return torch.bincount(exponents, minlength=256)
