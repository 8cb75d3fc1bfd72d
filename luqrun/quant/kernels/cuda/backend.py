"""The kernels on NVIDIA GPUs, compiled by Triton: one pass over memory each, and never a wait of the host.

Same functions, signatures and codes as luqrun.quant.kernels.reference. Element order is row-major whatever the memory
format, so a channels_last tensor needs no copy and gets the codes of its contiguous twin. With TRITON_INTERPRET=1,
set before triton is imported, the same kernels run on CPU tensors, for tests.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from luqrun.quant.encoding import Encoding
from luqrun.quant.formats import Format
from luqrun.quant.kernels.cuda import blocks
from luqrun.quant.kernels.cuda import loops as kernels
from luqrun.quant.kernels.cuda.launch import launch, native, pattern
from luqrun.quant.kernels.layout import empty, in_memory_order, is_channels_last
from luqrun.quant.kernels.philox import SAMPLE_SLOTS

# torch's, of CPU tensors that are interpreted
from luqrun.quant.kernels.reference import batch_norm, batch_norm_backward  # noqa: F401

TILE = 2048  # elements of an encode tile: 16 a thread, which leaves registers for enough programs beside each other
TILES = 4  # such tiles a program at most: the words of the stream and 1 / scale are computed once for all
WAVE = 2048  # programs that fill a large GPU about twice
QUADS = 128  # channels / 4 of a channels_last tile at most
STATISTICS_TILE = (4, 1024)
STATISTICS_PROGRAMS = 2048
RELU_ROWS = 512  # bytes of the mask a program

quantizes_blocks, encode_blocks, decode_blocks = blocks.quantizes_blocks, blocks.encode_blocks, blocks.decode_blocks


def describe() -> str:
    """What run.json records."""
    return f"triton {triton.__version__}" + (", interpreted (slow)" if triton.knobs.runtime.interpret else "")


def statistics(x: Tensor, moments: bool, unless: Tensor | None = None) -> Tensor:
    """See reference.statistics. The order of summation differs, but is the same in every run and on every GPU."""
    partials, programs = _partial_statistics(x, moments, unless)
    if programs == 1:
        return partials[0]
    total = torch.empty(4, dtype=torch.float64, device=x.device)
    launch(kernels.combine_statistics, 1, partials, total, programs, BLOCK=STATISTICS_PROGRAMS)
    return total


def _partial_statistics(x: Tensor, moments: bool, unless: Tensor | None) -> tuple[Tensor, int]:
    """Statistics of parts of x, float64 (programs, 4), and how many they are: none of an empty x."""
    x = native(x)
    programs = min(triton.cdiv(x.numel(), math.prod(STATISTICS_TILE)), STATISTICS_PROGRAMS)
    partials = torch.empty(programs, 4, dtype=torch.float64, device=x.device)
    if programs:
        unless = None if unless is None else unless.to(x.device)
        options = {"MOMENTS": moments, "ROWS": STATISTICS_TILE[0], "COLUMNS": STATISTICS_TILE[1]}
        launch(kernels.statistics, programs, x, unless, partials, x.numel(), **options)
    return partials, programs


def quantize(
    x: Tensor,
    how: Encoding,
    hindsight: Tensor | None,
    stream: Tensor,
    dtype: torch.dtype,
    packed: bool,
    known: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As cpu.backend.quantize: three launches or few more, and with a hindsight maximum one pass over x. known is not
    read: here nobody measures ahead (quant.measured)."""
    x = native(x)
    estimate = None if hindsight is None or how.range != "hindsight" else hindsight.to(x.device)
    # Whether integer codes have a sign is known from the present alone.
    once = estimate is not None and how.form.logarithmic
    partials, programs = _partial_statistics(x, how.range == "sawb", estimate if once else None)
    scale, signed, maximum = (
        torch.empty((), dtype=each, device=x.device) for each in (torch.float32, torch.bool, torch.float32)
    )
    constants = {name: value for name, value in _constants(how.form).items() if "BITS" not in name}
    c1, c2 = map(pattern, how.sawb)
    constants |= {"SAWB": how.range == "sawb", "C1": c1, "C2": c2, "POW2": how.pow2_scale}
    outputs = partials, estimate, scale, signed, maximum, programs, x.numel()
    launch(kernels.choose_scale, 1, *outputs, **constants, CHECKED=not once, BLOCK=STATISTICS_PROGRAMS)
    codes, fields, found = encode(x, scale, signed, how, stream, 0, dtype, packed, once)
    if once:
        maximum, scale = found, torch.where(found.isfinite(), scale, torch.nan)
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
    assert 0 <= sample < SAMPLE_SLOTS
    x = native(x)
    device, numel, last, form = x.device, x.numel(), is_channels_last(x), how.form
    codes = torch.empty_like(x, dtype=dtype or form.code_dtype)
    # The two codes of a byte are neighbours in memory: an odd number of channels would pair two pixels.
    beside = packed and not (last and form.field_bits == 4 and x.shape[1] % 2)
    fields = torch.empty(form.field_bytes(numel) if beside else 0, dtype=torch.uint8, device=device)
    # The kernel compares bit patterns; those of 0 are zeros.
    maximum = torch.zeros(() if observe else 0, dtype=torch.int32, device=device)
    if numel == 0:
        return codes, fields, maximum.view(torch.float32)
    draws = how.is_stochastic
    tensors = (x, codes, fields if beside else None, maximum if observe else None, scale.to(device), signed.to(device))
    stream = stream.to(device) if draws else None
    options = dict(_constants(form), ROUNDING=how.rounding, UNDERFLOW=how.underflow)
    if draws and last:
        _encode_channels_last(tensors, stream, sample, options)
    else:
        width = 4 if draws else _width(x.dtype, codes.dtype)
        tiles = triton.cdiv(numel, TILE)
        each = _tiles_each(tiles)
        counts = (sample, numel, fields.numel(), each)
        launch(kernels.encode_flat, triton.cdiv(tiles, each), *tensors, stream, *counts, **options, **_tile(width))
    if packed and not beside:
        fields = pack(codes, form)
    return codes, fields, maximum.view(torch.float32)


def _encode_channels_last(tensors: tuple, stream: Tensor, sample: int, options: dict) -> None:
    images, channels, height, width = tensors[0].shape
    pixels = height * width
    assert pixels < 2**30  # inside an image, pixels are numbered by int32
    unit = 4 if channels % 4 == 0 else 1
    # Four pixels of a channel share a Philox call, unless such groups straddle channels.
    together = 4 if pixels % 4 == 0 else 1
    # Tiles as wide as the channels: what a program reads then lies together.
    quads = min(triton.next_power_of_2(triton.cdiv(channels, 4)), QUADS)
    rows = TILE // (4 * quads * together)
    channel_blocks = triton.cdiv(channels, 4 * quads)
    row_blocks = triton.cdiv(pixels, rows * together)
    each = _tiles_each(images * channel_blocks * row_blocks)
    chunks = triton.cdiv(row_blocks, each)
    counts = (sample, pixels, channels // unit, each, chunks, channel_blocks)
    tile = {"UNIT": unit, "PIXELS": together, "ROWS": rows, "QUADS": quads}
    programs = images * chunks * channel_blocks
    launch(kernels.encode_channels_last, programs, *tensors, stream, *counts, **options, **tile)


def pack(codes: Tensor, form: Format) -> Tensor:
    """See reference.pack."""
    codes = in_memory_order(codes)
    fields = torch.empty(form.field_bytes(codes.numel()), dtype=torch.uint8, device=codes.device)
    if codes.numel():
        counts = (codes.numel(), fields.numel())
        _launch_tiles(kernels.pack, codes, fields, *counts, width=_width(codes.dtype), form=form)
    return fields


def unpack(
    fields: Tensor, shape: Sequence[int], channels_last: bool, signed: Tensor, form: Format, dtype: torch.dtype
) -> Tensor:
    """See reference.unpack."""
    codes = empty(shape, channels_last, dtype, fields.device)
    if codes.numel():
        tensors = (fields, codes, signed.to(fields.device))
        _launch_tiles(kernels.unpack, *tensors, codes.numel(), fields.numel(), width=_width(dtype), form=form)
    return codes


def relu_(x: Tensor, most: float | None = None, found: Tensor | None = None, moments: bool = False) -> Tensor:
    """See reference.relu_."""
    flat = in_memory_order(x)
    mask = torch.empty(triton.cdiv(x.numel(), 8), dtype=torch.uint8, device=x.device)
    if x.numel():
        programs = triton.cdiv(mask.numel(), RELU_ROWS)
        launch(kernels.relu, programs, flat, mask, x.numel(), mask.numel(), MOST=most, ROWS=RELU_ROWS)
    if flat.data_ptr() != x.data_ptr():  # x was not dense
        x.copy_(flat)
    if found is not None:
        found.copy_(statistics(x, moments))
    return mask


def relu_backward(grad: Tensor, mask: Tensor, channels_last: bool) -> Tensor:
    """See reference.relu_backward."""
    grad = grad.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    out = empty(grad.shape, channels_last, grad.dtype, grad.device)
    if grad.numel():
        programs = triton.cdiv(mask.numel(), RELU_ROWS)
        launch(kernels.relu_backward, programs, grad, mask, out, grad.numel(), mask.numel(), ROWS=RELU_ROWS)
    return out


def _launch_tiles(kernel, *arguments, width: int, form: Format) -> None:
    constants = {key: value for key, value in _constants(form).items() if "LIMIT" not in key}
    programs = triton.cdiv(arguments[-2], TILE)
    launch(kernel, programs, *arguments, **constants, **_tile(width))


@functools.cache
def _constants(form: Format) -> dict:
    return {
        "FLOATING": form.floating,
        "BITS": form.bits,
        "FIELD_BITS": form.field_bits,
        "LIMIT": form.limit,
        "UNSIGNED_LIMIT": form.unsigned_limit,
    }


def _width(*dtypes: torch.dtype) -> int:
    """Elements that a thread moves at once: 16 bytes, at least 4 elements."""
    return max(16 // max(dtype.itemsize for dtype in dtypes), 4)


def _tile(width: int) -> dict:
    return {"ROWS": TILE // width, "WIDTH": width}


def _tiles_each(tiles: int) -> int:
    """Tiles a program, for so many in all: many where still enough programs are left."""
    return max(1, min(TILES, tiles // WAVE))
