"""Whether a device's kernels give the reference's bits on random tensors: all that they write, compared bit for bit."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from luqrun.bench.contenders import BLOCKS, E3M0, E3M0_HINDSIGHT, INT4, oracle
from luqrun.bench.gpu_check import Row
from luqrun.quant.encoding import Encoding
from luqrun.quant.gemms import ConvOp
from luqrun.quant.grids import Lines, grid_of
from luqrun.quant.kernels import backend_for, blocks, ops, reference
from luqrun.quant.kernels.layout import is_channels_last
from luqrun.quant.kernels.philox import make_stream
from luqrun.quant.quantizer import Quantizer

INT_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
SAMPLE = 3
ROUNDING_OF_SUMS = 1e-12  # relative: sums in float64 may have another order
CONV = ConvOp((1, 1), (1, 1), (1, 1), 1)
Pairs = Iterator[tuple[str, Tensor, Tensor]]  # what, of the device, of the reference


def tensors(elements: int, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Random numbers of many magnitudes on the CPU: a vector, a matrix and images in both memory formats, in fp32 and
    bf16, of random shapes of about so many elements at most."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * torch.exp2(3 * torch.randn(shape, generator=generator))

    columns, channels = rng.randint(1, math.isqrt(elements)), rng.choice((3, 5, 6, 8, 16, 24))
    side = max(1, math.isqrt(elements // (4 * channels)))
    image = normal(rng.randint(1, 4), channels, rng.randint(1, side), rng.randint(1, side))
    found = {
        "vector": normal(rng.randint(1, elements)),
        "matrix": normal(max(1, elements // columns), columns),
        "contiguous images": image,
        "channels_last images": image.to(memory_format=torch.channels_last),
    }
    for name, x in found.items():
        yield f"{name} {tuple(x.shape)}", x
        yield f"{name} {tuple(x.shape)}, bf16", x.bfloat16()


def is_same(found: Tensor, expected: Tensor) -> bool:
    """Type, shape and every bit, which tells +0 from -0 and compares NaN."""
    if found.dtype != expected.dtype or found.shape != expected.shape:
        return False
    bits = INT_OF_SIZE[found.dtype.itemsize]
    return torch.equal(found.cpu().contiguous().view(bits), expected.contiguous().view(bits))


def _encoded(how: Encoding) -> Callable[[Tensor, torch.device, int], Pairs]:
    """Codes, packed fields and maximum; and the way back from the fields."""

    def compare(x: Tensor, device: torch.device, seed: int) -> Pairs:
        scale, signed = x.float().abs().max() / how.form.limit * 0.8, torch.tensor(True)
        stream, dtype = make_stream(seed, 3, 2, 7, 1, 4), torch.bfloat16
        expected = reference.encode(x, scale, signed, how, stream, SAMPLE, dtype, True, True)
        moved = [each.to(device) for each in (x, scale, signed)]
        found = ops.encode(*moved, how.key, stream.to(device), SAMPLE, dtype, True, True)
        yield from zip(("codes", "fields", "maximum"), found, expected, strict=True)
        last = is_channels_last(found[0])
        yield "unpacked", ops.unpack(found[1], x.shape, last, moved[2], how.form.name, dtype), expected[0]
        yield "packed", backend_for(device.type).pack(found[0], how.form), expected[1]

    return compare


def _quantized(quantizer: Quantizer) -> Callable[[Tensor, torch.device, int], Pairs]:
    """A whole quantization: with its statistics and its scale."""

    def compare(x: Tensor, device: torch.device, seed: int) -> Pairs:
        stream = make_stream(seed, 1, 2, 3)
        hindsight = x.abs().max().float() * 0.9 if quantizer.range == "hindsight" else None
        moved = None if hindsight is None else hindsight.to(device)
        found = quantizer.run(x.to(device), stream.to(device), moved, torch.bfloat16, True)
        with oracle("cpu"):
            expected = quantizer.run(x, stream, hindsight, torch.bfloat16, True)
        yield from zip(found._fields, found, expected, strict=True)

    return compare


def _in_blocks(quantizer: Quantizer) -> Callable[[Tensor, torch.device, int], Pairs]:
    """Along rows and columns of a matrix, and the channels and the batch of images; with the way back."""

    def compare(x: Tensor, device: torch.device, seed: int) -> Pairs:
        how, last = quantizer.encoding, is_channels_last(x)
        if x.dim() == 4:
            lines = [CONV.lines(gemm, "activation", x.shape, last) for gemm in ("fprop", "wgrad")]
        else:
            lines = [Lines.along(x.shape, axis) for axis in range(x.dim())]
        maximum, stream, dtype = x.float().abs().max(), make_stream(seed, 1, 1, 5), torch.bfloat16
        for grid in (grid_of(how, each) for each in lines):
            expected = blocks.encode_blocks(x, how, *grid, maximum, stream, SAMPLE, dtype, True)
            moved, at = (x.to(device), how.key, *grid, maximum.to(device)), f"grid {grid.sizes}"
            found = ops.encode_blocks(*moved, stream.to(device), SAMPLE, dtype, True)
            for name, one, other in zip(("values", "fields", "scales", "tensor scale"), found, expected, strict=True):
                yield f"{name}, {at}", one, other
            decoded = ops.decode_blocks(*found[1:3], x.shape, last, how.key, *grid, dtype)
            yield f"decoded, {at}", decoded, blocks.decode_blocks(*expected[1:3], x.shape, last, how, *grid, dtype)

    return compare


def _relu(most: float | None) -> Callable[[Tensor, torch.device, int], Pairs]:
    def compare(x: Tensor, device: torch.device, seed: int) -> Pairs:
        # A copy of both, in this memory format: they work in place.
        ours, theirs = x.to(device, copy=True), x.clone()
        mask, expected = ops.relu_(ours, most), reference.relu_(theirs, most)
        yield "mask", mask, expected
        yield "output", ours, theirs
        last = is_channels_last(x)
        yield "gradient", ops.relu_backward(x.to(device), mask, last), reference.relu_backward(x, expected, last)

    return compare


def _statistics(x: Tensor, device: torch.device, seed: int) -> Pairs:
    found, expected = ops.statistics(x.to(device), True).cpu(), reference.statistics(x, True)
    yield "maximum and sign", found[:2], expected[:2]
    close = torch.allclose(found[2:], expected[2:], rtol=ROUNDING_OF_SUMS, atol=0)
    yield f"sums, to {ROUNDING_OF_SUMS:g}", expected[2:] if close else found[2:], expected[2:]


def _rotated(x: Tensor, device: torch.device, seed: int) -> Pairs:
    stream, lines = make_stream(seed, 5), Lines.along(x.shape, 0)
    signs = ops.signs(stream.to(device), 16)
    yield "signs", signs, blocks.signs(stream, 16)
    found = ops.hadamard(x.contiguous().to(device), lines.grid, lines.axis, 16, signs)
    yield "rotated", found, blocks.hadamard(x.contiguous(), lines.grid, lines.axis, 16, signs.cpu())


QUANTIZERS = {"e3m0, absmax": E3M0, "int4, SAWB": INT4, "e3m0, hindsight": E3M0_HINDSIGHT}
KERNELS = {
    **{f"quantize {name}": _quantized(quantizer) for name, quantizer in QUANTIZERS.items()},
    **{
        f"encode {name}, {rounding}": _encoded(Encoding(name, rounding=rounding))
        for name in ("e3m0", "int4", "e2m1")
        for rounding in ("stochastic", "nearest")
    },
    **{f"encode in blocks: {name}": _in_blocks(Quantizer(**keys)) for name, keys in BLOCKS.items()},
    "ReLU": _relu(None),
    "ReLU6": _relu(6.0),
    "statistics": _statistics,
    "rotation and signs": _rotated,
}


def compared(name: str, device: torch.device, elements: int, seeds: int) -> Row:
    """One of KERNELS on tensors of so many seeds."""
    return _row(
        name,
        (
            (f"{what} of {kind}, seed {seed}", *pair)
            for seed in range(seeds)
            for kind, x in tensors(elements, seed)
            for what, *pair in KERNELS[name](x, device, seed)
        ),
    )


def large(name: str, device: torch.device, elements: int) -> Row:
    """A quantizer on a vector and on channels_last images of so many elements, against torch operations on the device
    itself: a CPU would take minutes. There each program of a kernel does several tiles."""
    quantizer, stream = QUANTIZERS[name], make_stream(11, 1, 2, 3).to(device)

    def pairs() -> Pairs:
        torch.manual_seed(0)
        for shape in ((elements,), (max(1, elements // (64 * 256)), 64, 16, 16)):
            x = torch.randn(shape, device=device)
            x = x.to(memory_format=torch.channels_last) if x.dim() == 4 else x
            hindsight = x.abs().max() * 0.9
            found = quantizer.run(x, stream, hindsight, torch.bfloat16, True)
            with oracle(device.type):
                expected = quantizer.run(x, stream, hindsight, torch.bfloat16, True)
            for what, one, other in zip(found._fields, found, expected, strict=True):
                yield f"{what} of {shape}", one, other.cpu()

    return _row(f"quantize {name}, {elements:,} elements, against torch operations on the device", pairs())


def _row(name: str, pairs: Pairs) -> Row:
    tried, wrong = 0, []
    for what, found, expected in pairs:
        tried += 1
        if not is_same(found, expected):
            wrong.append(what)
    found = f"other bits in {len(wrong)} of {tried} tensors: {wrong[0]}" if wrong else f"the same bits: {tried} tensors"
    return Row(name, found, not wrong, {"tensors": tried, "wrong": wrong})


def rows(device: torch.device, elements: int, seeds: int, many: int) -> Iterator[Row]:
    """A row a kernel, and a row a quantizer of many elements."""
    for name in KERNELS:
        yield compared(name, device, elements, seeds)
    for name in QUANTIZERS:
        yield large(name, device, many)
