"""The loops of the CPU at elements far beyond 2^31, without the memory: addresses are shifted back by as much."""

import itertools

import numpy as np
import pytest
import torch
from kernel_inputs import LAST, assert_identical, encoding, modes, normal
from test_philox import numpy_philox

from luqrun.quant.formats import FORMATS
from luqrun.quant.kernels import reference
from luqrun.quant.kernels.cpu import backend as cpu
from luqrun.quant.kernels.cpu import loops, memory, philox, quantize, requests
from luqrun.quant.kernels.cpu.sizes import CHUNK, ROW
from luqrun.quant.kernels.philox import make_stream

STREAM = make_stream(2**61 + 11, 3, 2, 7, 1, 4)
NAME = philox.stream_words(STREAM.numpy(), 0)
# First elements: multiples of CHUNK, as a task's are; bytes of four an element leave 2^31 and 2^32 much earlier.
STARTS = pytest.mark.parametrize("start", [2**29, 2**30, 2**31 - CHUNK, 2**31, 2**32, 2**34, 2**40 + 5 * CHUNK])
COUNT = 2 * ROW + 37


def words_from(monkeypatch, start):
    """The reference numbers its elements as if they lay behind `start` others."""
    arange = torch.arange
    monkeypatch.setattr(torch, "arange", lambda *sizes, **options: arange(*sizes, **options) + start // 4)


def back(tensor, elements):
    """The address from which `tensor` lies `elements` of its elements away."""
    return tensor.data_ptr() - elements * tensor.element_size()


def request(form, rounding, underflow, like, stored, **more):
    """What the tasks of quantize are told, but for what they find; and the array that has it."""
    bits, pair, kind, floating = requests.form_of(form, stored.dtype)
    coder = {0: quantize.encode_integers, 1: quantize.encode_powers}.get(floating, quantize.encode_floats)
    told = np.zeros(1, quantize.REQUEST)
    numbers = {
        **{"half": like.dtype == torch.bfloat16, "bits": bits, "pair": pair, "kind": kind, "floating": floating},
        **{"rounding": requests.MODES[rounding], "underflow": requests.MODES[underflow], "coder": coder.address()},
        **{"scale": 0.05, "low": 0 if form.logarithmic else -form.limit, "high": form.limit, "name": NAME.ctypes.data},
    }
    for name, value in {**numbers, **more}.items():
        told[0][name] = value
    return told


def at_task(function, told, number):
    """Run a task; the pattern of the largest magnitude (int32) that it found."""
    found = np.zeros(1, np.int32)
    told[0]["largest"] = found.ctypes.data - 4 * number
    function.serial(told.ctypes.data, number)
    return found[0]


def guarded(count, dtype):
    """Memory with an edge on either side that nothing may touch."""
    whole = torch.full((count + 128,), 85, dtype=dtype)
    return whole, whole[64:-64]


def assert_edges(whole):
    assert (whole[:64] == 85).all()
    assert (whole[-64:] == 85).all()


@STARTS
@pytest.mark.parametrize("name", ["int4", "e3m0", "e4m0"])
def test_encoding(name, start, monkeypatch):
    form = FORMATS[name]
    for rounding, underflow in modes(form):
        inside = normal(COUNT).clamp(-3.2, 3.2)  # 64 scales, as float32: that no element is beyond is promised
        for x, dtype in ((inside, torch.float32), (normal(COUNT).bfloat16(), form.code_dtype)):
            (edges, codes), (byte_edges, fields) = (
                guarded(COUNT, dtype),
                guarded(COUNT * form.field_bits // 8 + 1, torch.uint8),
            )
            told = request(
                form, rounding, underflow, x, codes, x=back(x, start), elements=start + COUNT,
                codes=back(codes, start), fields=fields.data_ptr() - start * form.field_bits // 8,
                finite=x.dtype == torch.float32, observe=True,
            )  # fmt: skip
            found = at_task(quantize.encode_flat, told, start // CHUNK)
            with monkeypatch.context() as patch:
                words_from(patch, start)
                scale, signed = torch.tensor(0.05), torch.tensor(True)
                expected = reference.encode(x, scale, signed, encoding(form, rounding, underflow), STREAM, 0, dtype)[0]
            assert_identical(codes, expected)
            packed = reference.pack(expected, form)
            assert torch.equal(fields[: packed.numel()], packed)
            assert found.view(np.float32) == x.float().abs().max()
            assert_edges(edges)
            assert_edges(byte_edges)


# Within the image at element 2^34 the words' counters cross 2^32.
@pytest.mark.parametrize("start", [2**31, 2**32, 2**34, 2**38])
@pytest.mark.parametrize("size", [(6, 8), (5, 7)], ids=["groups of pixels", "single words"])
@pytest.mark.parametrize("finite", [False, True])
@pytest.mark.parametrize("channels", [5, 2 * philox.LANES])
def test_encoding_of_images(size, start, finite, channels):
    form, pixels = FORMATS["e3m0"], size[0] * size[1]
    image = start // (channels * pixels)
    first = image * channels * pixels
    x = normal(1, channels, *size).clamp(-3.2, 3.2).to(memory_format=LAST)  # 64 scales: `finite` promises as much
    edges, codes = guarded(channels * pixels, torch.int8)
    sizes = {"each": 1, "images": image + 1, "pixels": pixels, "channels": channels}
    at = {"x": back(x, first), "codes": back(codes, first), "finite": finite}
    at_task(quantize.encode_images, request(form, "stochastic", "stochastic", x, codes, **sizes, **at), image)
    # Element first + i takes word (first + i) % 4 of counter (first + i) // 4.
    group = np.arange(first // 4, (first + channels * pixels) // 4 + 1, dtype=np.uint64)
    counter = group & np.uint64(0xFFFFFFFF), group >> np.uint64(32), NAME[2], NAME[3]
    words = np.stack(np.broadcast_arrays(*numpy_philox(counter, NAME[:2])), 1).reshape(-1)
    words = words[first % 4 :][: channels * pixels].astype(np.int64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "random_words", lambda stream, sample, numel: torch.from_numpy(words))
        how = torch.tensor(0.05), torch.tensor(True), encoding(form, "stochastic"), STREAM
        expected = reference.encode(x.contiguous(), *how)[0]
    assert torch.equal(codes.view(*size, channels).permute(2, 0, 1), expected[0])
    assert_edges(edges)


@STARTS
def test_measuring(start):
    x = normal(COUNT)
    x[-1], x[3] = -9.0, 8.0
    for each in (x, x.bfloat16()):
        extremes, sums, number = np.zeros(2, np.int32), np.zeros(2, np.float64), start // CHUNK
        found = {"extremes": extremes.ctypes.data - 8 * number, "sums": sums.ctypes.data - 16 * number}
        told = request(
            FORMATS["int4"],
            "nearest",
            None,
            each,
            each,
            x=back(each, start),
            elements=start + COUNT,
            moments=1,
            **found,
        )
        quantize.measure.serial(told.ctypes.data, number)
        expected = reference.statistics(each, True)
        assert extremes[:1].view(np.float32)[0] == expected[0] == 9.0
        assert extremes[1] < 0
        torch.testing.assert_close(torch.from_numpy(sums), expected[2:], rtol=1e-12, atol=0)


@STARTS
def test_loading_storing_and_packing(start):
    codes = torch.randint(-7, 8, (ROW,), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    for dtype in cpu.KINDS:
        edges, target = guarded(ROW, dtype)
        memory.store(codes.numpy(), back(target, start), cpu.KINDS[dtype], start)
        assert torch.equal(target, codes.to(dtype))
        assert_edges(edges)
    # Bytes of int4 are joined as they are stored; other codes are split into fields first.
    for name, dtype in itertools.product(("int4", "int8"), (torch.int8, torch.float32)):
        form, stored = FORMATS[name], codes.to(dtype)
        edges, fields = guarded(ROW * form.field_bits // 8, torch.uint8)
        split, scratch = np.empty(ROW, np.uint8), np.empty(ROW, np.float32)
        address = fields.data_ptr() - start * form.field_bits // 8
        how = requests.form_of(form, dtype), split, scratch
        memory.fields_row(codes.numpy(), back(stored, start), address, start, *how)
        assert torch.equal(fields, reference.pack(codes, form))
        assert_edges(edges)


@pytest.mark.parametrize("channels", [8, 5])
@pytest.mark.parametrize("images", [2**22, 2**31, 2**36])
def test_patches(images, channels):
    # The last two of so many images: the rows of their patches, and their pixels, lie far beyond 2^31.
    height, width, kernel, stride, padding, dilation = 6, 7, (3, 3), (1, 1), (1, 1), (1, 1)
    a = torch.randint(-7, 8, (2, height, width, channels), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    line = width * 9 * channels
    edges, block = guarded(2 * height * line, torch.int8)
    geometry = height, width, *kernel, *stride, *padding, *dilation
    first, size = (images - 2) * height, (images, height, width, channels)
    address = back(a, (images - 2) * height * width * channels)
    loops.patches(2 * height, block.numel(), block.data_ptr(), address, first, *size, *geometry)
    columns = torch.nn.functional.unfold(a.permute(0, 3, 1, 2).float(), kernel, dilation, padding, stride)
    expected = columns.view(2, channels, 9, height * width).permute(0, 3, 2, 1).reshape(-1)
    assert torch.equal(block, expected.char())
    assert_edges(edges)
