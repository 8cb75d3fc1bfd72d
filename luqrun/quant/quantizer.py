"""A quantizer: range -> scale, rounding, samples. Turns a tensor into codes and one scale.

Immutable and without state: what a hindsight range remembers is a tensor that the caller owns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from luqrun.config import GradientConfig, OperandConfig, check_at_least, check_choice
from luqrun.errors import UserError
from luqrun.quant.formats import SAWB, Format, get_format, pack
from luqrun.quant.kernels import fuses, know, ops
from luqrun.quant.kernels.philox import make_stream

RANGES = ("absmax", "sawb", "hindsight")
ROUNDINGS = ("nearest", "stochastic")
UNDERFLOWS = ("flush", "nearest", "stochastic")
SAMPLES_SCOPES = ("wgrad", "both")
MAX_SAMPLES = 64

SMALLEST = 2.0**-149  # the smallest positive float32


@dataclass(frozen=True, repr=False)
class QuantizedTensor:
    """codes * scale. codes: form.code_dtype, the shape of the source; scale: 0-dim float32; signed: 0-dim bool.

    A NaN or Inf in the source makes the scale NaN, and with it every value.
    """

    codes: Tensor
    scale: Tensor
    signed: Tensor
    form: Format

    def __repr__(self):
        return f"QuantizedTensor({self.form.name}, shape={tuple(self.codes.shape)}, scale={self.scale.item():.6g})"

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values, in `dtype`."""
        return (self.codes.float() * self.scale).to(dtype)

    def packed(self) -> Tensor:
        """The codes in row-major order at form.bits bits each: uint8, ceil(numel * bits / 8) bytes (formats.pack)."""
        return pack(self.form.to_fields(self.codes), self.form.bits)


class Encoded(NamedTuple):
    """What one quantization gives: codes (x's shape), scale and signed (0-dim) as in QuantizedTensor; fields, the
    packed codes (uint8, memory order; empty unless asked for); maximum, max|x| as 0-dim float32."""

    codes: Tensor
    scale: Tensor
    signed: Tensor
    fields: Tensor
    maximum: Tensor


@dataclass(frozen=True)
class Quantizer:
    """How one operand becomes 4-bit codes; the fields are the keys under quant.weight and the others.

    format: see luqrun.quant.formats. range: absmax (the largest code is max|x|, Eq. 11), sawb (integer formats) or
    hindsight (Eq. 18, with `hindsight_momentum` for eta). rounding: nearest or stochastic. underflow, below the
    smallest power of two of a logarithmic format: flush, nearest or stochastic (default: as `rounding`). samples:
    independent draws whose weight gradients are averaged (SMP, 5.1); samples_scope: wgrad, or both for dgrad too.
    pow2_scale: the scale is rounded up to a power of two (A.7). redraw_every: steps (and micro-steps of one) that
    share their random numbers (re-use, A.5.2). two_phase: wgrad gets a quantization of its own, with levels half way
    (in powers) between those of dgrad's: radix 4 only, after Ultra-low (Sun et al., 2020). Raises UserError for what
    does not go together.
    """

    format: str
    range: str = "absmax"
    rounding: str = "nearest"
    underflow: str | None = None
    samples: int = 1
    samples_scope: str = "wgrad"
    pow2_scale: bool = False
    hindsight_momentum: float = 0.1
    redraw_every: int = 1
    two_phase: bool = False

    def __post_init__(self):
        check_choice("range", self.range, RANGES)
        check_choice("rounding", self.rounding, ROUNDINGS)
        check_choice("samples_scope", self.samples_scope, SAMPLES_SCOPES)
        check_at_least("samples", self.samples, 1)
        if self.samples > MAX_SAMPLES:
            raise UserError(f"samples={self.samples} is too many; at most {MAX_SAMPLES}")
        if not 0 <= self.hindsight_momentum < 1:
            raise UserError(f"hindsight_momentum={self.hindsight_momentum} is out of range; allowed: 0 <= eta < 1")
        form = self.form
        if self.underflow is None:
            if form.logarithmic:
                object.__setattr__(self, "underflow", self.rounding)
        elif not form.logarithmic:
            raise UserError(f"underflow={self.underflow} is for logarithmic formats; with format={form.name}, omit it")
        else:
            check_choice("underflow", self.underflow, UNDERFLOWS)
        if self.range == "sawb" and (form.logarithmic or form.bits not in SAWB):
            allowed = ", ".join(f"int{bits}" for bits in SAWB)
            raise UserError(f"range=sawb has no coefficients for format={form.name}; allowed formats: {allowed}")
        check_at_least("redraw_every", self.redraw_every, 1)
        if self.redraw_every > 1 and not self.is_stochastic:
            raise UserError(
                f"redraw_every={self.redraw_every} needs rounding or underflow=stochastic: nothing is drawn"
            )
        if self.two_phase and (form.radix != 4 or self.is_stochastic):  # stochastic, wgrad's would clip and be biased
            raise UserError("two_phase=true needs format=e3m0_radix4, and rounding and underflow without draws")
        if self.samples > 1 and not self.is_stochastic:
            raise UserError(f"samples={self.samples} needs rounding or underflow=stochastic: all draws would be equal")

    @classmethod
    def from_config(cls, config: OperandConfig | GradientConfig, key: str) -> Quantizer:
        """From its part of the config; errors name keys under `key` (such as quant.weight)."""
        try:
            names = {field.name for field in fields(cls)}
            return cls(**{name: value for name, value in vars(config).items() if name in names})
        except UserError as error:
            raise UserError(f"{key}.{error}") from None

    @property
    def form(self) -> Format:
        return get_format(self.format)

    @property
    def repeats(self) -> bool:
        """Whether quantizing the same tensor once more gives the same codes."""
        return not self.is_stochastic and self.range != "hindsight"

    @property
    def is_stochastic(self) -> bool:
        return "stochastic" in (self.rounding, self.underflow)

    def __str__(self):
        parts = [self.format, self.range, self.rounding]
        if self.underflow not in (None, self.rounding):
            parts.append(f"underflow={self.underflow}")
        if self.samples > 1:
            parts.append(f"samples={self.samples}" + (" (both)" if self.samples_scope == "both" else ""))
        if self.redraw_every > 1:
            parts.append(f"redraw_every={self.redraw_every}")
        parts += [name for name in ("pow2_scale", "two_phase") if getattr(self, name)]
        return "/".join(parts)

    def measure(
        self, x: Tensor, hindsight: Tensor | None = None, share: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(scale 0-dim float32, signed 0-dim bool, max|x| 0-dim float32) of x, all on x's device.

        hindsight: 0-dim float32, the estimate of the maximum from earlier steps (0: none yet, max|x| is used). share:
        turns the statistics of x (ops.statistics) into those of all parts of a distributed tensor, of equal size.
        """
        x = x.detach()
        statistics = ops.statistics(x, self.range == "sawb")
        largest, negative, sum1, sum2 = (statistics if share is None else share(statistics)).unbind()
        maximum = clip = largest.float()
        if self.range == "sawb":
            c1, c2 = SAWB[self.form.bits]
            count = max(x.numel(), 1)
            clip = (c1 * (sum2 / count).sqrt() - c2 * (sum1 / count)).float()
            clip = torch.where(clip > 0, torch.minimum(clip, maximum), maximum)
        elif self.range == "hindsight" and hindsight is not None:
            clip = torch.where(hindsight > 0, hindsight, maximum)
        # No tensor is made from a Python value here: on a GPU that would be a copy that the host waits for.
        signed = torch.ones_like(negative, dtype=torch.bool) if self.form.logarithmic else negative > 0
        scale = self._scale(clip, torch.where(signed, self.form.limit, self.form.unsigned_limit))
        return torch.where(maximum.isfinite(), scale, torch.nan), signed, maximum

    def _scale(self, clip: Tensor, limit: Tensor) -> Tensor:
        scale = clip / limit
        # Among subnormals the quotient may round down by much: the largest code must still reach the clip.
        scale = torch.where((scale.double() * limit < clip) & (scale < 2.0**-126), scale + SMALLEST, scale)
        if self.pow2_scale:
            # Up, so that nothing is clipped: carry any mantissa bit into the exponent.
            bits = scale.view(torch.int32)
            power = ((bits + 0x7FFFFF) & 0x7F800000).view(torch.float32)
            # Unless the largest code would leave float32: then down, and the top of the range is clipped.
            fits = (power.double() * limit <= torch.finfo(torch.float32).max) | ~clip.isfinite()
            scale = torch.where(fits, power, (bits & 0x7F800000).view(torch.float32))
        return scale

    def encode(
        self,
        x: Tensor,
        scale: Tensor,
        signed: Tensor,
        stream: Tensor,
        sample: int = 0,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Codes of x for a scale from `measure`, as `dtype` (default form.code_dtype).

        stream, sample: name the draw (luqrun.quant.kernels.philox).
        """
        return self._encode(x, scale, signed, stream, sample, dtype or self.form.code_dtype)[0]

    def _encode(self, x, scale, signed, stream, sample, dtype, packed=False, observe=False):
        how = self.format, self.rounding, self.underflow
        return ops.encode(x.detach(), scale, signed, *how, stream, sample, dtype, packed, observe)

    def run(
        self,
        x: Tensor,
        stream: Tensor,
        hindsight: Tensor | None,
        dtype: torch.dtype,
        packed: bool = False,
        share: Callable[[Tensor], Tensor] | None = None,
    ) -> Encoded:
        """Measure and encode x in as few passes as the range allows, the first sample of the draw `stream`.

        hindsight, share: as in `measure`. With it a logarithmic format reads x once: the maximum is found on the way.
        """
        x = x.detach()
        if fuses(x.device.type) and know(self.form) and share is None:
            how = self.format, self.rounding, self.underflow, self.range, self.pow2_scale, hindsight
            return Encoded(*ops.quantize(x, *how, stream, dtype, packed))
        if self.range == "hindsight" and self.form.logarithmic and hindsight is not None and share is None:
            first, negative, *_ = ops.statistics(x, False, hindsight).unbind()  # reads x where there is no estimate yet
            scale = self._scale(torch.where(hindsight > 0, hindsight, first.float()), self.form.limit)
            signed = torch.ones_like(negative, dtype=torch.bool)
            codes, fields, maximum = self._encode(x, scale, signed, stream, 0, dtype, packed, observe=True)
            scale = torch.where(maximum.isfinite(), scale, torch.nan)
        else:
            scale, signed, maximum = self.measure(x, hindsight, share)
            codes, fields, _ = self._encode(x, scale, signed, stream, 0, dtype, packed)
        return Encoded(codes, scale, signed, fields, maximum)

    def quantize(self, x: Tensor, seed: int = 0, sample: int = 0) -> QuantizedTensor:
        """Quantize x (any shape, any floating dtype, taken as float32). The draw is that of (seed, sample)."""
        if not x.is_floating_point():
            raise UserError(f"quantize takes floating tensors, not {x.dtype}")
        scale, signed, _ = self.measure(x)
        return QuantizedTensor(self.encode(x, scale, signed, make_stream(seed), sample), scale, signed, self.form)


def update_hindsight(hindsight: Tensor, maximum: Tensor, momentum: float) -> None:
    """In place m <- (1 - eta) max|x| + eta m (Eq. 18); the first maximum is taken as it is, a NaN or Inf not at all."""
    new = torch.where(hindsight > 0, (1 - momentum) * maximum + momentum * hindsight, maximum)
    hindsight.copy_(torch.where(maximum.isfinite(), new, hindsight))


def health(x: Tensor, quantized: QuantizedTensor) -> Tensor:
    """What quantization did to x: float32 (3,) of clipped share, underflow share, relative error ||x_q - x|| / ||x||.

    Clipped: beyond the largest code. Underflow: of the non-zero elements, those that became zero.
    """
    x = x.detach().double()  # squares of tiny and huge gradients leave float32
    codes, scale = quantized.codes, quantized.scale.double()
    limit = torch.where(quantized.signed, quantized.form.limit, quantized.form.unsigned_limit)
    clipped = (x.abs() > scale * limit * (1 + 1e-6)).float().mean()
    nonzero = x != 0
    underflow = ((codes == 0) & nonzero).sum() / nonzero.sum().clamp(min=1)
    error = (codes.double() * scale - x).norm() / x.norm().clamp(min=SMALLEST)
    return torch.stack([clipped, underflow, error.float()])
