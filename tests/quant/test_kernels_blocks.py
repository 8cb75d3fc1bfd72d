"""Blocks and rotations in the CPU's loops against torch operations, bit for bit, over any memory and grid."""

import random
from dataclasses import replace
from itertools import product

import pytest
import torch
from kernel_inputs import LAST, assert_identical, normal, tensors

from luqrun.quant.encoding import Encoding
from luqrun.quant.gemms import ConvOp, LinearOp
from luqrun.quant.grids import Grid, Lines, grid_of
from luqrun.quant.kernels import block_kernels, blocks, has_block_kernels, rotation_kernels
from luqrun.quant.kernels.cpu import backend as cpu
from luqrun.quant.kernels.cpu.block_loops import PANEL
from luqrun.quant.kernels.layout import dense, is_channels_last
from luqrun.quant.kernels.philox import make_stream
from luqrun.quant.operands import held_in_blocks

STREAM = make_stream(2**61 + 11, 3, 2, 7, 1, 4)
FORMS = ("e2m1", "e1m2", "e3m1", "int4", "int8", "e2m3")
KINDS = tensors()


def some_encoding(rng: random.Random) -> Encoding:
    """Any that the loops have."""
    keys = {
        "format": rng.choice(FORMS),
        "block": rng.choice((1, 2, 3, 16, 32, 40)),
        "range": rng.choice(("absmax", "rms")),
    }
    keys["scale_format"] = rng.choice(("e8m0", "e4m3", "fp32"))
    keys["rounding"] = rng.choice(("nearest", "stochastic"))
    if keys["scale_format"] == "e8m0":
        keys["scale_rounding"] = rng.choice(("floor", "rceil", "ceil", "even", "down"))
    if rng.random() < 0.3:
        keys["headroom"] = rng.choice((0.75, 0.9))
    if keys["scale_format"] == "e4m3" and not keys["format"].startswith("int"):
        which = rng.choice(("", "", "four_over_six", "eden"))
        if which == "four_over_six":
            keys[which] = rng.choice(("mse", "mae"))
        elif which:
            keys.update({"eden": True, "rounding": "nearest"})
    return Encoding(**keys)


def some_memory(rng: random.Random) -> tuple[torch.Tensor, tuple[int, int, int, int]]:
    """A tensor and a way to read its memory."""
    x = rng.choice(list(KINDS.values()))
    size, sizes = x.numel(), []
    for _ in range(3):
        divisors = [d for d in range(1, size + 1) if size % d == 0] if size else [0, 1, 3]
        sizes.append(rng.choice(divisors))
        size = size // sizes[-1] if sizes[-1] else 1
    grid = [*sizes, size]
    rng.shuffle(grid)
    return x, tuple(grid)


def both(x, how, grid, block, dtype, packed=True, sample=2):
    """What each backend makes of it, after they were seen to agree."""
    maximum = x.detach().float().abs().amax() if x.numel() else torch.zeros(())
    arguments = x, how, grid, block, maximum, STREAM, sample, dtype, packed
    expected, found = blocks.encode_blocks(*arguments), cpu.encode_blocks(*arguments)
    for name, one, other in zip(("values", "fields", "scales", "tensor scale"), expected, found, strict=True):
        one, other = (each + 0.0 if each.is_floating_point() else each for each in (one, other))  # -0 may be 0
        assert_identical(other, one, (name, how, grid, block))
    values, fields, scales, _ = expected
    if packed:
        layout = x.shape, is_channels_last(dense(x))
        for backend in (blocks, cpu):
            back = backend.decode_blocks(fields, scales, *layout, how, grid, block, dtype)
            assert_identical(back + 0.0, values + 0.0, how)
    return found


@pytest.mark.parametrize("number", range(12))
def test_any_encoding_of_any_memory_in_any_grid(number):
    rng = random.Random(number)
    for _ in range(25):
        how, (x, grid) = some_encoding(rng), some_memory(rng)
        x = x.contiguous() if how.eden else x  # whose scales' draws are numbered as the grids of layers have them
        side = rng.choice((1, 1, 2, 5, 16))
        block = rng.choice(((1, how.block), (how.block, 1), (side, how.block)))
        dtype = held_in_blocks(how, torch.bfloat16) if rng.random() < 0.5 else torch.float32
        both(x, how, grid, block, dtype, packed=rng.random() < 0.8, sample=rng.choice((0, 5)))


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_kind_of_tensor_in_lines(kind):
    for how in (
        Encoding("e2m1", block=5, rounding="stochastic"),
        Encoding("e2m1", block=4, scale_format="e4m3", four_over_six="mse", rounding="stochastic"),
        Encoding("e2m1", block=4, scale_format="e4m3", eden=True),
        Encoding("int4", block=16, scale_format="fp32", rounding="stochastic"),
    ):
        x = KINDS[kind].contiguous() if how.eden else KINDS[kind]
        for lines in (Lines(1, x.numel(), 1), Lines(1, x.numel() // 3, 3), Lines(x.numel() // 3, 3, 1)):
            if lines.outer * lines.length * lines.inner == x.numel():
                both(x, how, *grid_of(how, lines), torch.float32)


@pytest.mark.parametrize("size", [1, 15, 16, 17, PANEL - 1, PANEL, PANEL + 1, 2 * PANEL + 33, (1 << 16) + 21])
def test_blocks_around_the_ends_of_panels_and_tasks(size):
    how = Encoding("e2m1", block=16, rounding="stochastic")
    for dtype in (torch.float32, torch.bfloat16):
        x = normal(size).to(dtype)
        both(x, how, *grid_of(how, Lines(1, size, 1)), dtype)
    both(normal(size), replace(how, block=PANEL + 3), (1, 1, 1, size), (1, PANEL + 3), torch.float32)
    both(
        normal(2, size), replace(how, scale_format="e4m3", scale_rounding=None), (1, 2, 1, size), (2, 7), torch.float32
    )


@pytest.mark.parametrize(
    ("grid", "block"),
    [
        ((1, 5000, 1, 4), (4500, 1)),
        ((1, 2, 1, 5464), (2, 683)),
        ((1, 2, 1, 5466), (2, 683)),
        ((1, 70, 1, 300), (32, 1)),
        ((3, 33, 2, 10), (16, 16)),
        ((2, 3, 1, 4097), (1, 3)),
    ],
)
def test_elements_that_share_a_byte_are_of_one_panel(grid, block):
    x = normal(*grid)
    for how in (Encoding("e2m1", block=16), Encoding("e2m1", block=16, scale_format="e4m3", four_over_six="mse")):
        both(x, how, grid, block, torch.float32)


# Sums whose last bits decide: in the order of the block, and in no other


def shuffled(block, rest, rng):
    """Rows of these 16 numbers in many orders. rest: so small that it is about the last bits of sums."""
    return torch.tensor([rng.sample(block + [rng.choice((1, -1)) * x for x in rest], 16) for _ in range(200)])


@pytest.mark.parametrize(("compared", "ones", "tiny"), [("mse", 12, 2.0**-26), ("mae", 2, 2.0**-53)])
def test_four_over_six_decides_a_tie_by_the_blocks_own_order(compared, ones, tiny):
    # Scales 1 and 1.5: 5 becomes 4 or 6, and 4.5; 1 stays, and becomes 0.75. Both errors are 1, but for the last bits.
    how = Encoding("e2m1", block=16, scale_format="e4m3", four_over_six=compared)
    rng, chosen = random.Random(1), set()
    for height, block in ((1, (1, 16)), (16, (16, 1)), (4, (4, 4))) * 4:
        x = shuffled([6.0, 5.0] + [1.0] * ones, [tiny * rng.uniform(0.5, 2) for _ in range(14 - ones)], rng)
        x = x if height == 1 else x.view(200, height, -1).transpose(0, 1).reshape(height, -1)
        arguments = x, how, (1, *x.shape[:1], 1, x.shape[1]), block, torch.tensor(how.top * how.scale_limit)
        expected, found = (each.encode_blocks(*arguments, STREAM, 0, torch.float32) for each in (blocks, cpu))
        assert_identical(found[2], expected[2], (compared, block))
        chosen.update(expected[2].tolist())
    assert chosen == {0x38, 0x3C}  # 1 and 1.5, for sums that are equal


def test_a_range_of_root_mean_squares_is_rounded_as_the_blocks_own_order_is():
    how, rng, varied = Encoding("e2m1", block=16, range="rms", scale_format="fp32"), random.Random(2), 0
    for _ in range(30):
        between = 1 + rng.randrange(1, 2**23) * 2.0**-23 + 2.0**-24  # two float32
        rest = [2.0**-26 * rng.uniform(0.5, 2) for _ in range(11)]
        left, block = 16 * (between / blocks.RMS_CLIP) ** 2 - sum(t * t for t in rest), []
        for part in (0.3, 0.6, 0.9, 1.0, 1.0):
            block.append(torch.tensor((max(left, 0.0) * part) ** 0.5).item())
            left -= block[-1] ** 2
        x = shuffled(block, rest, rng)
        found = both(x, how, (1, 1, 1, x.numel()), (1, 16), torch.float32)
        varied += len(found[2].unique()) > 1
    assert varied > 3


def test_every_field_and_every_byte_of_a_scale_comes_back():
    for form, scale_format in product(FORMS, ("e8m0", "e4m3")):
        how = Encoding(form, block=16, scale_format=scale_format)
        scales = torch.arange(256 if scale_format == "e8m0" else 128, dtype=torch.uint8)
        fields = torch.arange(256, dtype=torch.uint8).repeat(8) if how.form.field_bits == 4 else torch.arange(64).byte()
        fields = fields & (2**how.form.bits - 1) if how.form.field_bits == 8 else fields
        elements = len(fields) * 8 // how.form.field_bits
        grid = (1, len(scales), 1, elements)
        arguments = fields.repeat(len(scales)), scales.repeat_interleave(-(-elements // 16)), (len(scales), elements)
        found = [each.decode_blocks(*arguments, False, how, grid, (1, 16), torch.float32) for each in (blocks, cpu)]
        assert_identical(found[1] + 0.0, found[0] + 0.0, (form, scale_format))


def test_inputs_stay_as_they_are():
    x, stream = torch.randn(3, 40, requires_grad=True), STREAM.clone()
    before, maximum = x.detach().clone(), torch.tensor(3.0)
    how = Encoding("e2m1", block=16, scale_format="e4m3", headroom=0.9, rounding="stochastic")
    signs = torch.ones(8)
    for backend in (blocks, cpu):
        values, fields, scales, tensor_scale = backend.encode_blocks(
            x, how, (3, 1, 1, 40), (1, 16), maximum, stream, 0, torch.float32, True
        )
        kept = fields.clone(), scales.clone()
        backend.decode_blocks(fields, scales, x.shape, False, how, (3, 1, 1, 40), (1, 16), torch.float32)
        backend.hadamard(x, (3, 1, 1, 40), 3, 8, signs)
        tensor_scale.zero_()  # nobody else's
        assert not values.requires_grad
        assert torch.equal(fields, kept[0])
        assert torch.equal(scales, kept[1])
    assert torch.equal(x, before)
    assert torch.equal(stream, STREAM)
    assert maximum == 3
    assert torch.equal(signs, torch.ones(8))


# The memory format


ENCODINGS = [
    Encoding("e2m1", block=16, rounding="stochastic"),
    Encoding("e2m1", block=[4, 16], rounding="stochastic"),
    Encoding("e2m1", block=3, scale_format="e4m3", four_over_six="mse", rounding="stochastic"),
    Encoding("e2m1", block=5, scale_format="e4m3", eden=True),
    Encoding("e2m1", block=[3, 4], scale_format="e4m3", eden=True),
]
OPERANDS = [
    ("fprop", "activation"),
    ("fprop", "weight"),
    ("dgrad", "gradient"),
    ("dgrad", "weight"),
    ("wgrad", "activation"),
]


@pytest.mark.parametrize("backend", [blocks, cpu], ids=["torch", "cpu"])
@pytest.mark.parametrize("how", ENCODINGS, ids=str)
@pytest.mark.parametrize("shape", [(5, 18, 3, 4), (9, 6, 1, 3), (1, 12, 3, 3), (2, 24, 5, 1)], ids=str)
def test_a_channels_last_tensor_has_the_codes_and_scales_of_its_contiguous_twin(backend, how, shape):
    x = normal(*shape)
    for groups, (gemm, operand) in product((1, 3), OPERANDS):
        if operand == "weight" and shape[0] % groups:
            continue
        op, found = ConvOp((1, 1), (0, 0), (1, 1), groups), []
        for each in (x, x.to(memory_format=LAST)):
            laid = op.laid_out(each, how)
            grid = op.grid(gemm, operand, laid.shape, is_channels_last(laid), how)
            values, _, _, scale = backend.encode_blocks(
                laid, how, *grid, x.abs().amax(), STREAM, 1, torch.float32, False
            )
            assert values.stride() == laid.stride()
            found.append(values * scale)
        assert torch.equal(*found), (gemm, operand, groups)


# Where they lie (of convolutions: test_block_layers.py)


def test_lines_of_a_linear_layer():
    op, how = LinearOp(), Encoding("e2m1", block=16)
    assert op.lines("fprop", "activation", (2, 5, 40), False) == (10, 40, 1)
    assert op.lines("fprop", "weight", (7, 40), False) == (7, 40, 1)
    assert op.lines("dgrad", "gradient", (2, 5, 7), False) == (10, 7, 1)
    assert op.lines("dgrad", "weight", (7, 40), False) == (1, 7, 40)
    assert op.lines("wgrad", "gradient", (2, 5, 7), False) == (1, 10, 7)
    assert op.lines("wgrad", "activation", (40,), False) == (1, 1, 40)
    assert op.grid("dgrad", "weight", (7, 40), False, how) == Grid((1, 7, 1, 40), (16, 1))
    tile = Encoding("e2m1", block=(16, 8))
    assert op.grid("dgrad", "weight", (7, 40), False, tile) == op.grid("fprop", "weight", (7, 40), False, tile)
    assert op.laid_out(torch.zeros(2, 3, 4, 5).to(memory_format=LAST), how).is_contiguous()


# Rotations


@pytest.mark.parametrize("size", [2, 8, 16, 32, 64, 128, 256])
@pytest.mark.parametrize("signed", [False, True])
def test_rotations_agree(size, signed):
    signs = (torch.arange(size) % 3 > 0).float() * 2 - 1 if signed else None
    for kind, x in KINDS.items():
        for lines in (Lines(1, x.numel(), 1), Lines(1, x.numel() // 5, 5), Lines(x.numel() // 7, 7, 1)):
            if lines.outer * lines.length * lines.inner != x.numel():
                continue
            found, expected = (each.hadamard(x, lines.grid, lines.axis, size, signs) for each in (cpu, blocks))
            assert_identical(found, expected, (kind, lines))
    x = normal(3, 2 * size + 1, 70)
    for lines in (Lines.along(x.shape, axis) for axis in range(3)):
        found, expected = (each.hadamard(x, lines.grid, lines.axis, size, signs) for each in (cpu, blocks))
        assert_identical(found, expected, lines)


def test_which_module_quantizes_in_blocks():
    powers, numbers = Encoding("e3m0", block=16), Encoding("e2m1", block=16)
    assert has_block_kernels("cpu", numbers)
    assert not has_block_kernels("cpu", powers)
    assert block_kernels("cpu", numbers) is rotation_kernels("cpu") is cpu
    assert block_kernels("cpu", powers) is blocks
