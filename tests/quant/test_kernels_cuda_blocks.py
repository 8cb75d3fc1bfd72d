"""Blocks in Triton against torch's operations, bit for bit: on a GPU where there is one, else interpreted."""

import pytest
import torch
from block_inputs import E4M3, E8M0, FP32, SCALES, TILE, matrices, normal
from kernel_inputs import assert_identical

from luqrun.quant import gemms, kernels
from luqrun.quant.encoding import Encoding
from luqrun.quant.gemms import ConvOp, LinearOp
from luqrun.quant.grids import grid_of_axis
from luqrun.quant.kernels import blocks, ops
from luqrun.quant.kernels.layout import is_channels_last
from luqrun.quant.kernels.philox import make_stream

triton = pytest.importorskip("triton")

from luqrun.quant.kernels.cuda import backend as cuda  # noqa: E402
from luqrun.quant.kernels.cuda import blocks as cuda_blocks  # noqa: E402

ON_GPU = torch.cuda.is_available() and not triton.knobs.runtime.interpret
DEVICE = "cuda" if ON_GPU else "cpu"
LAST = torch.channels_last
STREAM = make_stream(2**61 + 11, 3, 2, 7, 1, 4)
KINDS = matrices()
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered")  # of the interpreter, with what is huge


def edges(scale_format):
    """(9, 70): rows of many kinds; of far fewer magnitudes where the tensor has a scale too."""
    apart = KINDS["rows apart"][::6] if scale_format == "e4m3" else KINDS["wide"][:5]
    kinds = ("outliers", "small integers", "tiny")
    return torch.cat([apart, *(KINDS[kind][:1] for kind in kinds), KINDS["blocks of zeros"][3:4]])


def assert_same(x, how, grid, dtype=torch.float32, packed=True, sample=41):
    """All that encode_blocks returns, and the way back from the fields."""
    maximum = x.float().abs().max() if x.numel() else torch.tensor(0.0)
    moved, rest = x.to(DEVICE), (STREAM, sample, dtype, packed)
    expected = blocks.encode_blocks(moved.cpu(), how, *grid, maximum, *rest)
    found = cuda.encode_blocks(moved, how, *grid, maximum.to(DEVICE), *rest)
    for name, one, other in zip(("values", "fields", "scales", "tensor_scale"), found, expected, strict=True):
        assert_identical(one.cpu(), other, (name, how.key, grid))
    if packed:
        layout = x.shape, is_channels_last(expected[0]), how, *grid, dtype
        decoded = cuda.decode_blocks(*found[1:3], *layout).cpu()
        assert_identical(decoded, blocks.decode_blocks(*expected[1:3], *layout), ("decoded", how.key, grid))
    return [each.cpu() for each in found]


def check(x, axis=-1, dtype=torch.float32, packed=True, **keys):
    """Of a contiguous tensor, with blocks along an axis or tiles over the last two."""
    how = Encoding(**{"format": "e2m1", **keys})
    return assert_same(x, how, grid_of_axis(how, x.shape, axis)[0], dtype, packed)


def roundings(keys):
    return ("nearest",) if keys.get("eden") else ("nearest", "stochastic")


@pytest.mark.parametrize("name", list(SCALES))
def test_every_scale_and_rounding(name):
    keys = SCALES[name]
    dtype = torch.float32 if keys["scale_format"] == "fp32" else torch.bfloat16
    for rounding in roundings(keys):
        values, fields, scales, _ = check(edges(keys["scale_format"]), dtype=dtype, rounding=rounding, **keys)
        assert fields.unique().numel() > 40
        assert scales.unique().numel() > 5
        assert values.isfinite().all()


@pytest.mark.parametrize("name", ["rceil", "e4m3", "quest", "four over six, mae", "eden"])
def test_every_kind_of_block(name):
    keys = {**SCALES[name], "rounding": roundings(SCALES[name])[-1]}  # draws show which element is which
    x = normal(2, 5, 20) * torch.exp2(4 * normal(2, 5, 20, seed=3))
    check(x, 1, **{**keys, "block": 3})
    check(x[..., :7].contiguous(), **{**keys, "block": [2, 3]})
    if name in ("rceil", "e4m3"):
        for axis, block in ((-1, 16), (0, 16), (-1, 5), (-1, 1), (-1, [4, 8])):
            check(x, axis, **{**keys, "block": block})


# Of each line of memory the first offset is a multiple of 4, of 2, or odd: words and fields go together or alone.
@pytest.mark.parametrize("columns", [24, 22, 21])
def test_lines_of_every_length(columns):
    for rows, axis in ((3, -1), (1, -1), (3, 0)):
        for block in (8, 16):
            check(normal(rows, columns), axis, rounding="stochastic", block=block)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_images_in_either_memory(groups):
    op, how = ConvOp((1, 1), (0, 0), (1, 1), groups), Encoding("e2m1", rounding="stochastic", block=8)
    tiles = Encoding("e2m1", rounding="stochastic", block=(4, 8))
    eden = Encoding("e2m1", scale_format="e4m3", eden=True, block=2)
    for memory_format in (torch.contiguous_format, LAST):
        x = normal(5, 4, 3, 2).to(memory_format=memory_format)
        w = normal(8, 12 // groups, 2, 2).to(memory_format=memory_format)
        for each in (how, tiles, eden):
            for gemm, operand, tensor in (("fprop", "activation", x), ("wgrad", "gradient", x), ("dgrad", "weight", w)):
                tensor = op.laid_out(tensor, each)
                last = is_channels_last(tensor)
                assert_same(tensor, each, op.grid(gemm, operand, tensor.shape, last, each))


@pytest.mark.parametrize("form", ["e1m2", "e2m2", "e3m2", "int4", "int8", "e3m0"])
def test_other_formats(form):
    for keys in (E8M0, E4M3, FP32):
        for rounding in ("nearest", "stochastic"):
            check(edges(keys["scale_format"])[2:7], format=form, rounding=rounding, **keys)


def test_ties():
    for keys in (E8M0, E4M3, SCALES["four over six, mae"], FP32):
        check(KINDS["ties"], **keys)
    for name in ("rceil", "floor", "ceil", "even", "down", "down largest"):
        check(KINDS["maxima"], **SCALES[name])
        check(KINDS["tiny maxima"][::3], **SCALES[name])


def test_the_largest_and_smallest_scales():
    for form in ("e1m1", "int2"):
        _, _, scales, _ = check(KINDS["huge"][:3], format=form, **E8M0)
        assert scales.max() == 254
    smallest = torch.arange(60.0) * 2.0**-149
    for keys in (E8M0, FP32):
        check(smallest, **{**keys, "block": 6})  # half a scale of 2^-149 is 0


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_inf_take_what_shares_their_scale(bad):
    x = normal(2, 70)
    x[1, 40] = bad
    for name in ("rceil", "quest", "fp32", "e4m3", "four over six, mse", "eden"):
        values, fields, *_ = check(x, **SCALES[name])
        block = SCALES[name]["block"]
        inside = slice(40 // block * block, (40 // block + 1) * block)
        assert values[1, inside].isnan().all()
        lost = inside if SCALES[name]["scale_format"] != "e4m3" else slice(0, 70)
        assert not fields[35:][lost.start // 2 : lost.stop // 2].any()


def test_many_programs_and_far_offsets(monkeypatch):
    for name, size in (("TILE", 64), ("CHOOSERS", 4), ("JOINED", 32)):
        monkeypatch.setattr(cuda_blocks, name, size)
    for far in (2**31 - 2**16, 0):
        monkeypatch.setattr(cuda_blocks, "FAR", far)
        for axis in (0, -1):
            check(normal(19, 13), axis, rounding="stochastic", block=8)
        check(normal(2, 5, 10), rounding="stochastic", block=[4, 8])
        check(normal(200), block=64)
        check(normal(3, 10), **{**SCALES["four over six, mse"], "rounding": "stochastic", "block": 4})
        check(normal(3, 8), **{**SCALES["eden"], "block": 4})
        how = Encoding("e2m1", rounding="stochastic", block=4)
        x = normal(2, 6, 3, 2).to(memory_format=LAST)
        assert_same(x, how, ConvOp((1, 1), (0, 0), (1, 1), 1).grid("fprop", "activation", x.shape, True, how))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype(dtype):
    x = normal(2, 70)
    check(x.to(dtype), rounding="stochastic", **E4M3)
    check(x, dtype=dtype, format="int8", **E4M3)  # bf16 does not hold these products
    check(x, packed=False, rounding="stochastic", **E8M0)


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 32), (2, 0, 33)])
def test_empty_tensors(shape):
    for name in ("rceil", "four over six, mse", "eden", "fp32 headroom"):
        check(torch.zeros(shape), **SCALES[name])
        if len(shape) > 1:
            check(torch.zeros(shape), **{**SCALES[name], **TILE})


@pytest.mark.parametrize("keys", [E8M0, E4M3], ids=["e8m0", "e4m3"])
def test_every_byte_of_a_scale(keys):
    how = Encoding("e2m1", **{**keys, "block": 2})
    codes = torch.arange(256, dtype=torch.uint8)  # every pair of codes
    scales = torch.arange(256, dtype=torch.uint8)
    scales = scales if keys["scale_format"] == "e8m0" else scales % 128
    layout = (512,), False, how, (1, 1, 1, 512), (1, 2), torch.bfloat16
    found = cuda.decode_blocks(codes.to(DEVICE), scales.to(DEVICE), *layout)
    assert_identical(found.cpu(), blocks.decode_blocks(codes, scales, *layout))


def test_larger_blocks_are_left_to_torch_and_named(monkeypatch):
    monkeypatch.setattr(kernels, "backend_for", lambda device_type: cuda)
    monkeypatch.setattr(ops, "backend_for", lambda device_type: cuda)
    small, large = Encoding("e2m1", block=4096), Encoding("e2m1", block=(128, 64))
    assert kernels.block_kernels("cuda", small) is cuda
    assert kernels.block_kernels("cuda", large) is blocks
    assert "in torch operations" not in gemms.describe("cuda", [small])
    assert "e2m1 quantized in torch operations" in gemms.describe("cuda", [large])


@pytest.mark.skipif(ON_GPU, reason="with a GPU, Triton does not take CPU tensors")
def test_operators_run_on_them(monkeypatch):
    monkeypatch.setattr(kernels, "backend_for", lambda device_type: cuda)
    how, x = Encoding("e2m1", rounding="stochastic", **E4M3), normal(3, 40)
    grid, rest = LinearOp().grid("wgrad", "gradient", x.shape, False, how), (x.abs().max(), STREAM, 3)
    found = ops.encode_blocks(x, how.key, *grid, *rest, torch.bfloat16, True)
    expected = blocks.encode_blocks(x, how, *grid, *rest, torch.bfloat16, True)
    for one, other in zip(found, expected, strict=True):
        assert_identical(one, other)
    read = ops.decode_blocks(*found[1:3], x.shape, False, how.key, *grid, torch.bfloat16)
    assert torch.equal(read, found[0])
