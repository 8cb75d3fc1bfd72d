"""A quantizer: range -> scale, rounding, samples. Turns a tensor into codes and one scale, or one for each block.

Immutable and without state: what a hindsight range remembers is a tensor that the caller owns.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple, get_args, get_type_hints

import torch
from torch import Tensor

from luqrun.errors import UserError, check_at_least, check_at_most
from luqrun.quant.encoding import Encoding
from luqrun.quant.formats import FORMATS, Format, pack, unpack
from luqrun.quant.grids import Grid, expanded, grid_of_axis
from luqrun.quant.kernels import fuses, has_kernels, ops
from luqrun.quant.kernels.operators import is_direct
from luqrun.quant.kernels.philox import make_stream
from luqrun.quant.measured import statistics_of
from luqrun.quant.scale_formats import from_bytes, to_bytes

MAX_SAMPLES = 64
WORDS = {
    str: "a name",
    int: "an integer",
    float: "a number",
    bool: "true or false",
    tuple: "a tuple",
    list: "a list of two",
}

SMALLEST = 2.0**-149  # the smallest positive float32


@dataclass(frozen=True, repr=False)
class QuantizedTensor:
    """codes * scale. codes: form.code_dtype, the shape of the source; scale: 0-dim float32; signed: 0-dim bool.

    In blocks, scale has the source's shape with the number of blocks in place of the axis (of a tile: the two axes)
    that they lie along, grid says which elements share one, and values are codes * scale * tensor_scale, 0-dim
    float32; the first product is exact but for fp32 scales. A NaN or Inf in the source makes its scale NaN, and with it
    every value that shares it.
    """

    codes: Tensor
    scale: Tensor
    signed: Tensor
    form: Format
    tensor_scale: Tensor | None = None
    grid: Grid | None = None
    scale_format: str | None = None

    def __repr__(self):
        scale = f"{tuple(self.scale.shape)} scales" if self.grid else f"scale={self.scale.item():.6g}"
        return f"QuantizedTensor({self.form.name}, shape={tuple(self.codes.shape)}, {scale})"

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values, in `dtype`."""
        if self.grid is None:
            return (self.codes.float() * self.scale).to(dtype)
        values = self.codes.float() * expanded(self.scale, self.grid).view(self.codes.shape)
        return (values * self.tensor_scale).to(dtype)

    def most(self, shape: Sequence[int]) -> Tensor:
        """The largest magnitude that each element's scale has a code for, float32, broadcastable to `shape`."""
        if self.grid is None:
            return self.scale * torch.where(self.signed, self.form.limit, self.form.unsigned_limit)
        return expanded(self.scale * self.form.limit * self.tensor_scale, self.grid).view(tuple(shape))

    def packed(self) -> Tensor:
        """The codes in row-major order at form.bits bits each: uint8, ceil(numel * bits / 8) bytes (formats.pack)."""
        return pack(self.form.to_fields(self.codes), self.form.bits)

    def packed_scales(self) -> Tensor:
        """The scales of blocks as bytes, flat (scale_formats.to_bytes; fp32 stays float32)."""
        if self.grid is None:
            raise UserError("a tensor with one scale has no scales to pack: take .scale")
        return to_bytes(self.scale.flatten() / self.form.unit, self.scale_format)


class Encoded(NamedTuple):
    """What one quantization gives: codes (x's shape), scale and signed (0-dim) as in QuantizedTensor; fields, the
    packed codes (uint8, memory order; empty unless asked for); maximum, max|x| as 0-dim float32."""

    codes: Tensor
    scale: Tensor
    signed: Tensor
    fields: Tensor
    maximum: Tensor


class Blocks(NamedTuple):
    """What one quantization in blocks gives: values (x's shape), codes times their block's scale; fields and scales,
    what is kept (see kernels.blocks); tensor_scale, 0-dim float32, which values are to be multiplied by."""

    values: Tensor
    fields: Tensor
    scales: Tensor
    tensor_scale: Tensor


@dataclass(frozen=True)
class Quantizer:
    """How an operand of a GEMM becomes 4-bit codes; the fields are the keys in conf/quant/*.yaml.

    format, range, rounding, underflow, pow2_scale, largest, and of blocks block, scale_format, scale_rounding,
    four_over_six, headroom, eden: see Encoding. requantize: in a GEMM of the backward pass, the operand is quantized
    from what fprop made of it instead of from the tensor itself. samples: independent draws that are averaged
    (SMP, 5.1). hindsight_momentum: eta of a hindsight range (Eq. 18). redraw_every: steps (and micro-steps of one) that
    share their random numbers (re-use, A.5.2). Raises UserError for what does not go together.
    """

    format: str
    range: str = "absmax"
    rounding: str = "nearest"
    underflow: str | None = None
    samples: int = 1
    pow2_scale: bool = False
    hindsight_momentum: float = 0.1
    redraw_every: int = 1
    largest: int | float | None = None
    block: int | tuple | list | None = None
    scale_format: str | None = None
    scale_rounding: str | None = None
    four_over_six: str | None = None
    headroom: float = 1.0
    eden: bool = False
    requantize: bool = False

    def __post_init__(self):
        encoding = Encoding(**{each.name: getattr(self, each.name) for each in fields(Encoding)})
        for each in fields(Encoding):  # with the defaults that follow from others
            object.__setattr__(self, each.name, getattr(encoding, each.name))
        object.__setattr__(self, "encoding", encoding)  # no field: it follows from them
        check_at_least("samples", self.samples, 1)
        check_at_most("samples", self.samples, MAX_SAMPLES)
        if not 0 <= self.hindsight_momentum < 1:
            raise UserError(f"hindsight_momentum={self.hindsight_momentum} is out of range; allowed: 0 <= eta < 1")
        check_at_least("redraw_every", self.redraw_every, 1)
        for key in ("redraw_every", "samples"):
            if getattr(self, key) > 1 and not self.is_stochastic:
                raise UserError(f"{key}={getattr(self, key)} needs rounding or underflow=stochastic: nothing is drawn")

    @property
    def form(self) -> Format:
        return self.encoding.form

    @property
    def repeats(self) -> bool:
        """Whether quantizing the same tensor once more gives the same codes."""
        return not self.is_stochastic and self.range != "hindsight"

    @property
    def is_stochastic(self) -> bool:
        return self.encoding.is_stochastic

    @property
    def lies_alike(self) -> bool:
        """Whether a tensor gets the same codes for each GEMM: blocks of one axis lie along the contraction."""
        return self.block is None or self.encoding.tile is not None

    def __str__(self):
        parts = [self.format, self.range, self.rounding]
        if self.underflow not in (None, self.rounding):
            parts.append(f"underflow={self.underflow}")
        if self.samples > 1:
            parts.append(f"samples={self.samples}")
        if self.redraw_every > 1:
            parts.append(f"redraw_every={self.redraw_every}")
        if self.block is not None:
            parts.append(f"block={list(self.block) if isinstance(self.block, tuple) else self.block}")
            parts.append("/".join(each for each in (self.scale_format, self.scale_rounding) if each))
        if self.largest is not None:
            parts.append(f"largest={self.largest:.6g}")
        parts += [f"headroom={self.headroom}"] if self.headroom != 1 else []
        parts += [f"four_over_six={self.four_over_six}"] if self.four_over_six else []
        parts += [key for key in ("pow2_scale", "eden", "requantize") if getattr(self, key)]
        return "/".join(parts)

    def measure(
        self, x: Tensor, hindsight: Tensor | None = None, share: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(scale 0-dim float32, signed 0-dim bool, max|x| 0-dim float32) of x, all on x's device.

        hindsight: 0-dim float32, the estimate of the maximum from earlier steps (0: none yet, max|x| is used). share:
        turns the statistics of x (ops.statistics) into those of all parts of a distributed tensor, of equal size.
        """
        found = _statistics(x, self.range == "sawb")
        x = x.detach()
        largest, negative, sum1, sum2 = (found if share is None else share(found)).unbind()
        maximum = clip = largest.float()
        if self.range == "signed_max" and x.numel():
            clip = x.amax().float().clamp(min=0)
        if self.range == "sawb":
            c1, c2 = self.encoding.sawb
            count = max(x.numel(), 1)
            clip = (c1 * (sum2 / count).sqrt() - c2 * (sum1 / count)).float()
            clip = torch.where(clip > 0, torch.minimum(clip, maximum), maximum)
        elif self.range == "hindsight" and hindsight is not None:
            clip = torch.where(hindsight > 0, hindsight, maximum)
        # No tensor is made from a Python value here: on a GPU that would be a copy that the host waits for.
        always = self.form.logarithmic or self.form.mantissa_bits > 0
        signed = torch.ones_like(negative, dtype=torch.bool) if always else negative > 0
        scale = self._scale(clip, torch.where(signed, self._most, self.form.unsigned_limit))
        return torch.where(maximum.isfinite(), scale, torch.nan), signed, maximum

    @property
    def _most(self) -> float:
        """The code, or what lies between two, on which the range ends."""
        return self.form.limit if self.largest is None else self.largest / self.form.unit

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
        return ops.encode(x.detach(), scale, signed, self.encoding.key, stream, sample, dtype, packed, observe)

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
        plain = self.largest is None and self.range != "signed_max" and share is None
        if plain and fuses(x.device.type) and has_kernels(self.form, self.rounding):
            known = None if self.range == "hindsight" else statistics_of(x, self.range == "sawb")
            x = x if is_direct() else x.detach()
            return Encoded(*ops.quantize(x, self.encoding.key, hindsight, stream, dtype, packed, known))
        if self.range == "hindsight" and self.form.logarithmic and hindsight is not None and share is None:
            first, negative, *_ = ops.statistics(x, False, hindsight).unbind()  # reads x where there is no estimate yet
            scale = self._scale(torch.where(hindsight > 0, hindsight, first.float()), self._most)
            signed = torch.ones_like(negative, dtype=torch.bool)
            codes, fields, maximum = self._encode(x, scale, signed, stream, 0, dtype, packed, observe=True)
            scale = torch.where(maximum.isfinite(), scale, torch.nan)
        else:
            scale, signed, maximum = self.measure(x, hindsight, share)
            codes, fields, _ = self._encode(x, scale, signed, stream, 0, dtype, packed)
        return Encoded(codes, scale, signed, fields, maximum)

    def run_blocks(
        self,
        x: Tensor,
        stream: Tensor,
        grid: Grid,
        dtype: torch.dtype,
        packed: bool = False,
        share: Callable[[Tensor], Tensor] | None = None,
        sample: int = 0,
    ) -> Blocks:
        """Encode x in the blocks of a grid over its memory, its values as `dtype` (operands.held_in_blocks: one that
        holds them exactly). share: as in `measure`, for the scale of the tensor."""
        if self.scale_format == "e4m3":
            found = _statistics(x, False)
            maximum = (found if share is None else share(found))[0].float()
        else:
            maximum = x.new_empty((), dtype=torch.float32)  # not read
        x = x.detach()
        found = ops.encode_blocks(x, self.encoding.key, grid.sizes, grid.block, maximum, stream, sample, dtype, packed)
        return Blocks(*found)

    def quantize(self, x: Tensor, seed: int = 0, sample: int = 0, axis: int = -1) -> QuantizedTensor:
        """Quantize x (any shape, any floating dtype, taken as float32). The draw is that of (seed, sample); blocks lie
        along `axis`, tiles over the last two."""
        if not x.is_floating_point():
            raise UserError(f"quantize takes floating tensors, not {x.dtype}")
        if self.block is not None:
            grid, shape = grid_of_axis(self.encoding, x.shape, axis)
            found = self.run_blocks(x.contiguous(), make_stream(seed), grid, torch.float32, packed=True, sample=sample)
            signed = torch.ones((), dtype=torch.bool, device=x.device)
            codes = unpack(found.fields, self.form.field_bits, x.numel())
            codes = self.form.from_fields(codes, signed).view(x.shape)
            scale = from_bytes(found.scales, self.scale_format).view(shape) * self.form.unit
            return QuantizedTensor(codes, scale, signed, self.form, found.tensor_scale, grid, self.scale_format)
        scale, signed, _ = self.measure(x)
        return QuantizedTensor(self.encode(x, scale, signed, make_stream(seed), sample), scale, signed, self.form)


def _statistics(x: Tensor, moments: bool) -> Tensor:
    """ops.statistics, or what was found of them as x was made."""
    found = statistics_of(x, moments)
    return ops.statistics(x.detach(), moments) if found is None else found


def update_hindsight(hindsight: Tensor, maximum: Tensor, momentum: float) -> None:
    """In place m <- (1 - eta) max|x| + eta m (Eq. 18); the first maximum is taken as it is, a NaN or Inf not at all."""
    new = torch.where(hindsight > 0, (1 - momentum) * maximum + momentum * hindsight, maximum)
    hindsight.copy_(torch.where(maximum.isfinite(), new, hindsight))


def quantizer(**keys) -> Quantizer:
    """A quantizer of these keys, as they stand in conf/quant/*.yaml: `format` and what differs from the defaults.

    >>> luqrun.quantizer(format="e3m0", rounding="stochastic").quantize(x, seed=0).dequantize()

    Raises UserError for unknown keys, wrong types and values that do not go together.
    """
    known = get_type_hints(Quantizer)
    for key, value in keys.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise UserError(f"{key} is no key of a quantizer; allowed: {', '.join(near or known)}")
        _check_type(key, value, known[key])
    if "format" not in keys:
        raise UserError(f"format is missing; allowed: {', '.join(FORMATS)}")
    return Quantizer(**keys)


def _check_type(key: str, value: object, hint: object) -> None:
    """Raise UserError unless the value is of the type; an integer is a float too, and no bool an integer."""
    allowed = get_args(hint) or (hint,)
    fits = type(value) in allowed or (float in allowed and type(value) is int)
    if not fits:
        names = " or ".join("null" if each is type(None) else WORDS[each] for each in allowed)
        raise UserError(f"{key}={value!r} must be {names}")
