"""The kernels on the CPU: the torch side of luqrun.quant.kernels.cpu.quantize and loops.

Same functions, signatures and codes as luqrun.quant.kernels.reference. Element order is row-major whatever the memory
format, so a channels_last tensor needs no copy and gets the codes of its contiguous twin. `quantize` does in one call
what Quantizer.run composes of them.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Sequence

import numba
import torch
from torch import Tensor

from luqrun.quant.encoding import Encoding
from luqrun.quant.formats import Format
from luqrun.quant.kernels import reference
from luqrun.quant.kernels.cpu import blocks, driver, int8, loops, norm, passes, requests, rotation
from luqrun.quant.kernels.cpu.memory import loadable
from luqrun.quant.kernels.cpu.requests import KINDS, form_of
from luqrun.quant.kernels.cpu.sizes import chunks
from luqrun.quant.kernels.cpu.statistics import measuring
from luqrun.quant.kernels.layout import dense, empty, in_channels_last, is_channels_last, pixels_of
from luqrun.quant.kernels.operators import are_plain

# What small results are made like: half the time of naming size and dtype. Here and below the device is named: a
# torch.device that is set around a call must not count.
_FLOAT, _BOOL = (torch.zeros((), dtype=kind, device="cpu") for kind in (torch.float32, torch.bool))
with torch.inference_mode(False):
    _NO_FIELDS = torch.zeros(0, dtype=torch.uint8, device="cpu")  # all quantizations share it: there is nothing in it

quantizes_blocks, encode_blocks, decode_blocks = blocks.quantizes_blocks, blocks.encode_blocks, blocks.decode_blocks
hadamard, signs = rotation.hadamard, rotation.signs
int8_conv, int8_conv_dgrad, int8_conv_wgrad = int8.conv, int8.conv_dgrad, int8.conv_wgrad
int8_linear, int8_linear_wgrad = int8.linear, int8.linear_wgrad
layer_pass = passes.layer_pass


def describe() -> str:
    """What run.json records: the backend and its threads."""
    if not driver.THREADED:
        return f"numba {numba.__version__}, one thread: no OpenMP library (libgomp) was found"
    return f"numba {numba.__version__}, {driver.threads_for(sys.maxsize)} thread(s)"


def statistics(x: Tensor, moments: bool, unless: Tensor | None = None) -> Tensor:
    """See reference.statistics."""
    if x.numel() == 0 or (unless is not None and unless.item() > 0):
        return torch.zeros(4, dtype=torch.float64, device="cpu")
    x, found = loadable(x), torch.zeros(6, dtype=torch.float64, device="cpu")
    driver.in_turn(requests.measuring(x.numel(), x.data_ptr(), x.dtype, moments, found.data_ptr()))
    return found[2:].clone()  # memory of its own, as the operator promises


def quantize(
    x: Tensor,
    how: Encoding,
    hindsight: Tensor | None,
    stream: Tensor,
    dtype: torch.dtype,
    packed: bool,
    known: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(codes, scale, signed, fields, maximum): what Quantizer.run gives, sample 0, in one call.

    hindsight: the estimate of the maximum, 0-dim float32, or None. known: x's statistics, or None.
    """
    assert hindsight is None or hindsight.dtype == torch.float32
    x = loadable(x)
    scale, signed, maximum = torch.empty_like(_FLOAT), torch.empty_like(_BOOL), torch.empty_like(_FLOAT)
    results = 0, scale.data_ptr(), signed.data_ptr(), maximum.data_ptr(), 0 if known is None else known.data_ptr()
    expected = 0 if hindsight is None else hindsight.data_ptr()
    codes, fields = _encode(x, results, expected, how, stream, requests.of_range(how), dtype, packed)
    return codes, scale, signed, fields, maximum


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
    """See reference.encode."""
    given = [scale.item(), float(signed.item()), 0, 0, 0, 0]
    results = torch.tensor(given, dtype=torch.float64, device="cpu")
    steps, dtype = requests.given(observe, sample), dtype or how.form.code_dtype
    codes, fields = _encode(loadable(x), (results.data_ptr(), 0, 0, 0, 0), 0, how, stream, steps, dtype, packed)
    return codes, fields, results[2].float() if observe else x.new_empty(0, dtype=torch.float32)


def _encode(x, results, expected, how, stream, steps, dtype, packed) -> tuple[Tensor, Tensor]:
    """The codes and fields of numba_quantize.quantize. results, expected: addresses, of what the caller holds, from
    `results` to `statistics` and of `hindsight`; steps: as requests.of_range or requests.given has them."""
    form, wanted, count, layout = how.form, dtype, x.numel(), requests.layout_of(pixels_of(x), how)
    later = packed and layout[0] > 0  # fields of images may share a byte
    if later or dtype not in KINDS:
        dtype = form.code_dtype
    codes = torch.empty_like(x, dtype=dtype)
    fields = torch.empty(form.field_bytes(count), dtype=torch.uint8, device="cpu") if packed else _NO_FIELDS
    if count or not results[0]:  # of no elements a range is measured, too
        to = codes.data_ptr() if count else 0, 0 if later else fields.data_ptr()
        where = x.data_ptr(), x.dtype, *to, results, stream.data_ptr(), layout, expected
        driver.in_turn(requests.quantizing(count, *where, how, dtype, *steps))
    if later:
        _pack(codes, fields, form)
    return codes if dtype == wanted else codes.to(wanted), fields


def _pack(codes: Tensor, fields: Tensor, form: Format) -> None:
    count = codes.numel()
    loops.pack(chunks(count), count, count, codes.data_ptr(), fields.data_ptr(), *form_of(form, codes.dtype))


def pack(codes: Tensor, form: Format) -> Tensor:
    """See reference.pack."""
    codes = dense(codes).to(form.code_dtype)
    fields = torch.empty(form.field_bytes(codes.numel()), dtype=torch.uint8, device="cpu")
    _pack(codes, fields, form)
    return fields


def unpack(
    fields: Tensor, shape: Sequence[int], channels_last: bool, signed: Tensor, form: Format, dtype: torch.dtype
) -> Tensor:
    """See reference.unpack."""
    stored = dtype if dtype in KINDS else form.code_dtype
    codes = empty(shape, channels_last, stored, fields.device)
    count, addresses = codes.numel(), (fields.data_ptr(), codes.data_ptr())
    loops.unpack(chunks(count), count, count, *addresses, signed.data_ptr(), *form_of(form, stored))
    return codes.to(dtype)


def relu_(x: Tensor, most: float | None = None, found: Tensor | None = None, moments: bool = False) -> Tensor:
    """See reference.relu_; float32 and bf16."""
    assert x.dtype in (torch.float32, torch.bfloat16)
    assert dense(x) is x
    mask = torch.empty((x.numel() + 7) // 8, dtype=torch.uint8, device="cpu")
    half, count = int(x.dtype == torch.bfloat16), x.numel()
    how = x.data_ptr(), half, mask.data_ptr(), _pattern(math.nan if most is None else most, half)
    measuring(loops.rectify, chunks(count), count, count, *how, out=found, moments=moments)
    return mask


@functools.cache
def _pattern(value: float, half: int) -> int:
    """The bits of a float32, or of a bf16."""
    dtype, bits = (torch.bfloat16, torch.int16) if half else (torch.float32, torch.int32)
    return torch.tensor(value, dtype=dtype, device="cpu").view(bits).item()


def relu_backward(grad: Tensor, mask: Tensor, channels_last: bool) -> Tensor:
    """See reference.relu_backward; float32 and bf16."""
    assert grad.dtype in (torch.float32, torch.bfloat16)
    grad = grad.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    out = torch.empty_like(grad)
    half, count = int(grad.dtype == torch.bfloat16), grad.numel()
    loops.apply_mask(chunks(count), count, count, grad.data_ptr(), half, mask.data_ptr(), out.data_ptr())
    return out


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See reference.batch_norm."""
    vectors = weight, bias, running_mean, running_var
    function = norm.normalized if norm.suits(x, *vectors) else reference.batch_norm
    return function(x, *vectors, momentum, eps)


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
    """See reference.batch_norm_backward."""
    if mask is not None and is_channels_last(x):
        grad = in_channels_last(grad)  # as a ReLU's backward pass would leave it
    if is_channels_last(grad) and grad.dtype == x.dtype and are_plain((grad,)) and norm.suits(x, weight):
        return norm.gradients(grad, mask, x, weight, mean, inverse, found)
    grad = grad if mask is None else relu_backward(grad, mask, is_channels_last(x))
    return reference.batch_norm_backward(grad, None, x, weight, mean, inverse, eps, found)
