"""The kernels in plain torch operations: slow, on any device, and the oracle of all the others.

Every backend has these functions with these signatures and returns the same codes, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from luqrun.quant.encoding import Encoding
from luqrun.quant.formats import Format
from luqrun.quant.formats import pack as pack_fields
from luqrun.quant.formats import unpack as unpack_fields
from luqrun.quant.kernels.cpu.sizes import CHUNK, LINE, ROW
from luqrun.quant.kernels.layout import dense, empty, from_memory_order, in_memory_order, is_channels_last
from luqrun.quant.kernels.philox import random_words

FLOAT32_MAX = torch.finfo(torch.float32).max


def statistics(x: Tensor, moments: bool, unless: Tensor | None = None) -> Tensor:
    """What ranges need of x (any shape, floating): float64 tensor (4,) of max|x|, any negative, sum|x|, sum x^2.

    A NaN in x makes the maximum NaN, an Inf makes it Inf. Without `moments` the two sums are 0. Empty: zeros.
    unless: a 0-dim float; where it is positive nothing is read, and zeros come back. The sums are those of
    `add_up`, as on every CPU; a GPU has another order.
    """
    zeros = torch.zeros(4, dtype=torch.float64, device=x.device)
    if x.numel() == 0:
        return zeros
    x = dense(x.detach()).float()
    magnitude = x.abs()
    sums = zeros[2:]
    if moments:
        doubles = in_memory_order(magnitude).double()
        sums = add_up(doubles), add_up(doubles.square())
    found = torch.stack([magnitude.max().double(), (x < 0).any().double(), *sums])
    return found if unless is None else torch.where(unless > 0, zeros, found)


def add_up(terms: Tensor) -> Tensor:
    """The sum of a float64 tensor in its own order, 0-dim, in steps that give the same bits on every CPU.

    A row of ROW terms, filled up with zeros where it is short: LINE sums, each of every LINEth term; these by eight,
    which leaves eight sums, and then by halves. After that the rows of CHUNK terms, and the chunks, in turn.
    """
    rows = F.pad(terms.reshape(-1), (0, -terms.numel() % CHUNK)).view(-1, CHUNK // ROW, ROW // LINE, LINE // 8, 8)
    lanes = in_turn(in_turn(rows.movedim(2, 0)).movedim(2, 0))
    while lanes.shape[-1] > 1:
        first, second = lanes.chunk(2, -1)
        lanes = first + second
    return in_turn(in_turn(lanes.squeeze(-1).t()))


def in_turn(terms: Tensor) -> Tensor:
    """The sum along the first axis, one after the other: the same bits in every backend."""
    total = torch.zeros_like(terms[0]) if len(terms) else terms.new_zeros(terms.shape[1:])
    for term in terms:
        total = total + term
    return total


def encode(
    x: Tensor,
    scale: Tensor,
    signed: Tensor,
    how: Encoding,
    stream: Tensor,
    sample: int = 0,
    dtype: torch.dtype | None = None,
    packed: bool = False,
    observe: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, fields, maximum): the codes of x / scale, and what else one pass over x can give.

    codes: x's shape and memory format, as `dtype` (default form.code_dtype; every floating type holds them exactly
    down to bf16). fields: with `packed`, `pack(codes)`, else empty. maximum: with `observe`, max|x| as 0-dim float32
    (NaN where x has a NaN), else empty.

    scale: 0-dim float32; 0 and NaN give zero codes, so the values become 0 and NaN. signed: 0-dim bool, for
    integer formats. how: its range is not read. Nearest rounding is in the linear domain, with ties to even for
    integers and floating-point codes, away from zero for powers of two (Eq. 14); stochastic rounding is Eq. 12, below 1
    Eq. 10. stream, sample: see kernels.philox; read only where something is stochastic. Values beyond the largest code
    are clipped to it, non-finite ones get code 0: the quantizer makes their scale NaN.
    """
    x, form, draws = dense(x.detach()).float(), how.form, None
    if how.is_stochastic:
        draws = random_words(stream.to(x.device), sample, x.numel()).view(x.shape)
    usable = (x.abs() <= FLOAT32_MAX) & (scale > 0)
    if form.logarithmic:
        magnitude = torch.where(usable, x.abs() / scale, 0.0).clamp(max=form.limit)
        magnitude = log_magnitude(magnitude, how, draws)
        codes = torch.where(x < 0, -magnitude, magnitude)
    elif form.mantissa_bits:
        magnitude = torch.where(usable, x.abs() / scale, 0.0).clamp(max=form.limit)
        magnitude = float_magnitude(magnitude, form, how.rounding, draws)
        codes = torch.where(x < 0, -magnitude, magnitude)
    else:
        limit = torch.where(signed, form.limit, form.unsigned_limit)
        ratio = torch.where(usable, x / scale, 0.0).clamp(torch.where(signed, -limit, 0), limit)
        codes = ratio.round() if how.rounding == "nearest" else stochastic_round(ratio, draws)
    codes = codes.to(form.code_dtype)
    fields = pack(codes, form) if packed else torch.empty(0, dtype=torch.uint8, device=x.device)
    maximum = statistics(x, False)[0].float() if observe else x.new_empty(0)
    return codes.to(dtype or form.code_dtype), fields, maximum


def pack(codes: Tensor, form: Format) -> Tensor:
    """Codes (any floating or integer dtype) as fields of form.field_bits bits, in memory order: flat uint8.

    At 4 bits the first of two neighbours is the low half of its byte; the last byte is filled up with a zero.
    """
    return pack_fields(form.to_fields(in_memory_order(codes).reshape(-1)), form.field_bits)


def unpack(
    fields: Tensor, shape: Sequence[int], channels_last: bool, signed: Tensor, form: Format, dtype: torch.dtype
) -> Tensor:
    """The codes of `pack`, as `dtype`, in this shape and memory format. signed: as in `encode`."""
    flat = form.from_fields(unpack_fields(fields, form.field_bits, math.prod(shape)), signed)
    return from_memory_order(flat.to(dtype), shape, channels_last)


def relu_(x: Tensor, most: float | None = None, found: Tensor | None = None, moments: bool = False) -> Tensor:
    """x <- max(x, 0) in place, for x dense in contiguous or channels_last memory; returns the mask for its backward.

    The mask has a bit for each element in memory order, 0 where x <= 0: flat uint8, bit i being bit i % 8 of byte
    i // 8. NaN stays NaN and has bit 1. most: what larger values become (6 of ReLU6), with bit 0 from it on. found:
    float64 (4,) <- statistics(x, moments) of what x became, or None.
    """
    keep = ~(in_memory_order(x) <= 0)
    if most is not None:
        keep &= ~(in_memory_order(x) >= most)
        x.copy_(torch.where(x >= most, most, x))
    x.copy_(torch.where(x <= 0, 0, x))
    if found is not None:
        found.copy_(statistics(x, moments))
    return pack_fields(keep.to(torch.int32), 1)


def relu_backward(grad: Tensor, mask: Tensor, channels_last: bool) -> Tensor:
    """grad where the mask of `relu_` has a bit, 0 elsewhere; the mask is of a tensor in that memory format."""
    bits = from_memory_order(unpack_fields(mask, 1, grad.numel()), grad.shape, channels_last)
    return torch.where(bits > 0, grad, 0)


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(output, mean, 1 / sqrt(variance + eps)) of a batch norm in training; running mean and variance are updated.

    x: float32 or bf16 (N, C, H, W); the others float32 (C,), or None, but not all for bf16.
    """
    return torch.native_batch_norm(x, weight, bias, running_mean, running_var, True, momentum, eps)


def batch_norm_backward(
    grad: Tensor,
    mask: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    inverse: Tensor,
    eps: float,
    found: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(gradient of x, of weight, of bias) of a batch norm in training, whose output had this gradient.

    grad, x: float32 or bf16 (N, C, H, W); mask: of a `relu_` after it, in x's memory order, or None; weight, mean,
    inverse (1 / sqrt(variance + eps)): float32 (C,). found: float64 (4,) <- statistics(gradient of x, False), or None.
    """
    if mask is not None:
        grad = relu_backward(grad, mask, is_channels_last(x))
    # Without a weight, torch 2.14 writes the gradients for bf16 beyond their memory.
    weight = torch.ones_like(mean) if weight is None else weight
    rest = weight, None, None, mean, inverse, True, eps, (True, True, True)
    gradients = torch.ops.aten.native_batch_norm_backward(grad, x, *rest)
    if found is not None:
        found.copy_(statistics(gradients[0], False))
    return gradients


def int8_conv(
    a: Tensor,
    w: Tensor,
    scale: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    dtype: torch.dtype,
    channels_last: bool,
    signed: Tensor,
    groups: int = 1,
) -> Tensor:
    """See cpu.int8.conv. float64 holds all of these sums."""
    a = F.pad(a.double(), (padding[1], padding[1], padding[0], padding[0]))  # conv2d refuses negative padding
    return _scaled(F.conv2d(a, w.double(), None, stride, 0, dilation, groups), scale, dtype, channels_last)


def int8_conv_dgrad(
    g: Tensor,
    w: Tensor,
    scale: Tensor,
    shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    dtype: torch.dtype,
    channels_last: bool,
    signed: Tensor,
    groups: int = 1,
) -> Tensor:
    """See cpu.int8.conv_dgrad."""
    total = torch.nn.grad.conv2d_input(tuple(shape), w.double(), g.double(), stride, padding, dilation, groups)
    return _scaled(total, scale, dtype, channels_last)


def int8_conv_wgrad(
    grads: Sequence[Tensor],
    a: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
) -> Tensor:
    """See cpu.int8.conv_wgrad."""
    shape = grads[0].shape[1], a.shape[1] // groups, *kernel
    g = torch.stack([each.double() for each in grads]).sum(0)
    total = torch.nn.grad.conv2d_weight(a.double(), shape, g, stride, padding, dilation, groups)
    return total.float().permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def int8_linear(a: Tensor, w: Tensor, scale: Tensor, dtype: torch.dtype, signed: Tensor, adjoint: bool) -> Tensor:
    """See cpu.int8.linear."""
    return _scaled(a.double() @ (w if adjoint else w.t()).double(), scale, dtype, False)


def int8_linear_wgrad(grads: Sequence[Tensor], a: Tensor) -> Tensor:
    """See cpu.int8.linear_wgrad."""
    g, a = (x.double().reshape(math.prod(x.shape[:-1]), x.shape[-1]) for x in (sum(grads[1:], grads[0].double()), a))
    return (g.t() @ a).float()


def _scaled(sums: Tensor, scale: Tensor, dtype: torch.dtype, channels_last: bool) -> Tensor:
    out = empty(sums.shape, channels_last, dtype, sums.device)
    return out.copy_(sums.float() * scale)


def log_magnitude(ratio: Tensor, how: Encoding, draws: Tensor | None) -> Tensor:
    """|x| / scale >= 0 to 0 or a power of the radix, by arithmetic on the float32 bit pattern."""
    if how.rounding == "stochastic_log":
        return _rounded_in_the_logarithm(ratio, draws)
    bits = ratio.contiguous().view(torch.int32)
    if how.form.radix == 4:
        # The exponent's lowest bit is odd for even powers (its bias is 127): the power of four below.
        low = (((bits >> 23) - 1 | 1) << 23).view(torch.float32)
        position = (ratio / low - 1) / 3
        up = (draws >> 1) < (position * 2.0**31).to(torch.int64) if how.rounding == "stochastic" else ratio >= 2.5 * low
        power = torch.where(up, 4 * low, low)
    else:
        # 23 random bits (or one half) added to the mantissa carry into the exponent as often as they should.
        carry = (draws & 0x7FFFFF).to(torch.int32) if how.rounding == "stochastic" else 0x400000
        power = ((bits + carry) & 0x7F800000).view(torch.float32)
    if how.underflow == "stochastic":
        below = ((draws >> 1) < (ratio * 2.0**31).to(torch.int64)).float()
    else:
        below = (ratio >= 0.5).float() if how.underflow == "nearest" else torch.zeros_like(ratio)
    return torch.where(ratio >= 1, power, below)


def _rounded_in_the_logarithm(ratio: Tensor, draws: Tensor) -> Tensor:
    """As the code of Xi et al. (2023) has it (FACTS 8.1): alpha is code 2, below it code 0 or 2 without bias; above,
    log2(|x| / alpha) + 1 plus noise from -1/2 to 1/2 and the constant ln(4/3) - 1/2, to the nearest integer."""
    alphas = ratio / 2
    position = alphas.clamp(min=1).log2() + 1 + (draws.float() / 2.0**32 - 0.5) + (math.log(4 / 3) - 0.5)
    above = torch.exp2(position.round().clamp(0, 9))
    below = ((draws >> 1) < (alphas * 2.0**31).to(torch.int64)).float() * 2
    return torch.where(alphas >= 1, above, below)


def float_magnitude(ratio: Tensor, form: Format, rounding: str, draws: Tensor | None) -> Tensor:
    """0 <= |x| / scale <= form.limit to a code of a floating-point format; to nearest, ties to even."""
    exponent = (ratio.contiguous().view(torch.int32) >> 23) - 127
    step = (((exponent - form.mantissa_bits).clamp(min=0) + 127) << 23).view(torch.float32)
    steps = ratio / step  # exact: a power of two
    return (steps.round() if rounding == "nearest" else stochastic_round(steps, draws)) * step


def stochastic_round(ratio: Tensor, draws: Tensor) -> Tensor:
    """Away from zero with probability equal to the fraction, to 31 bits (all that fit a signed comparison)."""
    magnitude = ratio.abs()
    floor = magnitude.floor()  # of the magnitude: there the fraction is exact, also for a tiny negative ratio
    return (floor + ((draws >> 1) < ((magnitude - floor) * 2.0**31).to(torch.int64))).copysign(ratio)


def describe() -> str:
    """What run.json records."""
    return f"reference (torch {torch.__version__} operations, slow)"
