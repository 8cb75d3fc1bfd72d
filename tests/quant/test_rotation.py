"""Hadamard rotations of a GEMM's operands: the matrix, the signs, who shares them, and what cannot be."""

from dataclasses import replace

import pytest
import torch
from block_gemms import LAST, SEED
from torch import nn

import luqrun
from luqrun.errors import UserError
from luqrun.quant import layers
from luqrun.quant.convert import set_step
from luqrun.quant.gemms import ConvOp
from luqrun.quant.grids import Lines
from luqrun.quant.kernels.layout import is_channels_last
from luqrun.quant.kernels.philox import make_stream, of_gemm, random_words
from luqrun.quant.quantizer import Quantizer
from luqrun.quant.recipe import Dgrad, Fprop, Recipe, Wgrad
from luqrun.quant.rotation import SIZES, Rotation, rotate, signs_of, unrotate

pytestmark = pytest.mark.usefixtures("backend")

E8M0 = Quantizer("e2m1", block=16)
GEMMS = ("fprop", "dgrad", "wgrad")


def sylvester(size):
    """H_2n = [[H_n, H_n], [H_n, -H_n]], float64."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


# The matrix


def test_two_and_four_by_hand():
    half = torch.tensor(2.0) ** -0.5
    x = torch.tensor([[3.0, 5.0], [-1.0, 0.5]])
    expected = torch.tensor([[8.0, -2.0], [-0.5, -1.5]]) * half
    torch.testing.assert_close(rotate(x, Lines.along(x.shape, 1), Rotation(2), None), expected)
    x = torch.tensor([1.0, 2.0, 4.0, 8.0])
    assert rotate(x, Lines.along(x.shape, 0), Rotation(4), None).tolist() == [7.5, -2.5, -4.5, 1.5]
    signs = torch.tensor([1.0, -1.0, -1.0, 1.0])
    assert rotate(x, Lines.along(x.shape, 0), Rotation(4), signs).tolist() == [1.5, -4.5, -2.5, 7.5]


@pytest.mark.parametrize("size", SIZES)
def test_it_is_sylvesters_matrix_by_the_root_of_its_size_along_any_axis(size):
    matrix = sylvester(size)
    assert torch.equal(matrix @ matrix.t(), size * torch.eye(size, dtype=torch.float64))
    signs = (torch.randn(size) > 0).float() * 2 - 1
    for axis in range(3):
        shape = [3, 2, 5]
        sizes = [
            size,
            *(size >> halvings for halvings in range(size.bit_length())),
        ]  # of what is left over, smaller ones
        shape[axis] = sum(sizes)
        x = torch.randn(shape)
        found = rotate(x, Lines.along(shape, axis), Rotation(size), signs)
        along = signs.repeat(3)[: shape[axis]]
        groups = (x.movedim(axis, -1).double() * along).split(sizes, -1)
        turned = [group @ sylvester(group.shape[-1]) / group.shape[-1] ** 0.5 for group in groups]
        torch.testing.assert_close(found.movedim(axis, -1).double(), torch.cat(turned, -1), rtol=0, atol=1e-5)
        torch.testing.assert_close(found.norm(), x.norm())


def test_fewer_elements_than_a_group_are_rotated_in_groups_of_powers_of_two():
    x, signs = torch.randn(3, 15), torch.ones(16)
    signs[::3] = -1
    found = rotate(x, Lines.along(x.shape, 1), Rotation(16), signs)
    for first, size in ((0, 8), (8, 4), (12, 2)):
        part = x[:, first : first + size]
        own = rotate(part, Lines.along(part.shape, 1), Rotation(size), signs[first : first + size])
        assert torch.equal(found[:, first : first + size], own)
    assert torch.equal(found[:, 14], x[:, 14] * signs[14])


def test_nothing_is_nothing():
    for x in (torch.randn(0, 16), torch.randn(3, 0)):
        assert torch.equal(rotate(x, Lines.along(x.shape, 1), Rotation(16), None), x)


def test_any_dtype_becomes_float32():
    x = torch.randn(2, 8)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        found = rotate(x.to(dtype), Lines.along(x.shape, 1), Rotation(8), None)
        assert torch.equal(found, rotate(x.to(dtype).float(), Lines.along(x.shape, 1), Rotation(8), None))


@pytest.mark.parametrize("rotation", [Rotation(4), Rotation(8, "drawn")], ids=str)
@pytest.mark.parametrize("last", [False, True])
def test_unrotate_is_the_inverse_in_the_memory_of_layers(rotation, last):
    op = ConvOp((1, 1), (0, 0), (1, 1), 2)
    x = torch.randn(9, 22, 3, 4)
    x = x.to(memory_format=LAST) if last else x
    for gemm, operand in (("fprop", "activation"), ("fprop", "weight"), ("dgrad", "gradient"), ("wgrad", "activation")):
        laid = op.laid_out(x, None)
        lines = op.lines(gemm, operand, laid.shape, is_channels_last(laid))
        signs = signs_of(rotation, make_stream(1), gemm)
        turned = rotate(laid, lines, rotation, signs)
        assert turned.stride() == x.stride()
        assert not torch.allclose(turned, x)
        torch.testing.assert_close(unrotate(turned, lines, rotation, signs), x, rtol=0, atol=1e-5)


def test_an_outlier_is_spread_and_a_nan_takes_its_group():
    x = torch.zeros(1, 32)
    x[0, 3], x[0, 20] = 8.0, torch.nan
    found = rotate(x, Lines.along(x.shape, 1), Rotation(16), None)
    assert (found[0, :16].abs() == 2).all()
    assert found[0, 16:].isnan().all()


# Signs


def test_signs_are_ones_and_minus_ones_about_as_many(z_limit):
    assert signs_of(Rotation(16), make_stream(3), "wgrad") is None
    drawn = [signs_of(Rotation(256, "drawn"), make_stream(step=step), "wgrad") for step in range(64)]
    for signs in (*drawn, signs_of(Rotation(16, "fixed"), make_stream(), "wgrad")):
        assert set(signs.tolist()) == {-1.0, 1.0}
    assert abs(torch.cat(drawn).sum()) / (256 * 64) ** 0.5 < z_limit(1)


def test_fixed_signs_are_the_same_for_every_layer_step_and_gemm_and_those_of_a_larger_group_begin_alike():
    first = signs_of(Rotation(16, "fixed"), make_stream(), "wgrad")
    for stream in (make_stream(seed=7), make_stream(layer=3), make_stream(step=9), make_stream(rank=2)):
        for gemm in GEMMS:
            assert torch.equal(signs_of(Rotation(16, "fixed"), stream, gemm), first)
    assert torch.equal(signs_of(Rotation(128, "fixed"), make_stream(), "fprop")[:16], first)


def test_drawn_signs_are_others_for_each_seed_layer_step_micro_step_and_gemm():
    names = [(field, gemm) for field in ("seed", "layer", "step", "micro_step") for gemm in GEMMS]
    found = [signs_of(Rotation(128, "drawn"), make_stream(**{field: 1}), gemm) for field, gemm in names]
    found += [signs_of(Rotation(128, "drawn"), make_stream(), gemm) for gemm in GEMMS]
    for place, one in enumerate(found):
        assert not any(torch.equal(one, other) for other in found[:place])
        assert torch.equal(one, one.clamp(-1, 1).sign())


def test_drawn_signs_are_no_bits_of_an_operands_own_draw():
    signs = signs_of(Rotation(128, "drawn"), make_stream(5, 3, 0, 2), "dgrad")
    for operand in range(3):
        own = make_stream(5, 3, operand, 2)
        for name in (own, of_gemm(own, "dgrad")):
            assert not torch.equal(signs, (random_words(name, 0, 128) & 1).float() * 2 - 1)
        before = own.clone()
        assert torch.equal(signs, signs_of(Rotation(128, "drawn"), own, "dgrad"))  # the operand is not read
        assert torch.equal(own, before)


def weight_gradients(recipe, steps, x, g):
    """The weight's gradient of a layer in each of the steps."""
    layer, found = luqrun.quantize_model(nn.Linear(32, 6, bias=False), recipe, skip=(), seed=SEED), []
    for step in steps:
        set_step(layer, step)
        layer.weight.grad = None
        layer(x).backward(g)
        found.append(layer.weight.grad)
    return found


@pytest.mark.parametrize(("signs", "alike"), [("none", True), ("fixed", True), ("drawn", False)])
def test_which_steps_are_rotated_alike(signs, alike):
    x, g = torch.randn(32, 32), torch.randn(32, 6)
    recipe = Recipe("wgrad", wgrad=Wgrad(E8M0, E8M0, Rotation(16, signs)))
    first, second, again = weight_gradients(recipe, (3, 4, 3), x, g)
    assert torch.equal(first, again)
    assert torch.equal(first, second) == alike


def test_all_ranks_rotate_alike(monkeypatch):
    # What one rank makes of its part of the batch is added to what others make of theirs.
    x, g = torch.randn(32, 32), torch.randn(32, 6)
    recipe = Recipe("wgrad", wgrad=Wgrad(E8M0, E8M0, Rotation(16, "drawn")))
    stochastic = Recipe("drawn", wgrad=Wgrad(replace(E8M0, rounding="stochastic"), E8M0, Rotation(16, "drawn")))
    found, drawn = [], []
    monkeypatch.setattr(layers.dist, "is_initialized", lambda: True)
    for rank in (0, 5):
        monkeypatch.setattr(layers.dist, "get_rank", lambda rank=rank: rank)
        found += weight_gradients(recipe, (3,), x, g)
        drawn += weight_gradients(stochastic, (3,), x, g)
    assert torch.equal(*found)
    assert not torch.equal(*drawn)


def test_micro_steps_are_rotated_apart_and_evaluations_alike():
    x = torch.randn(32, 32)
    recipe = Recipe("fprop", Fprop(E8M0, E8M0, Rotation(16, "drawn")))
    layer = luqrun.quantize_model(nn.Linear(32, 6, bias=False), recipe, skip=(), seed=SEED)
    assert recipe.has_stochastic_forward
    first, second = layer(x), layer(x)
    assert not torch.equal(first, second)
    with torch.no_grad():
        evaluated = layer.eval()(x)
        set_step(layer, 8)
        assert torch.equal(layer(x), evaluated)


def test_a_gemm_in_high_precision_is_not_rotated():
    x = torch.randn(8, 32, requires_grad=True)
    recipe = Recipe("dgrad", Fprop(None, None, Rotation(16)), Dgrad(E8M0, None), Wgrad(None, None, Rotation(8)))
    plain = nn.Linear(32, 6, bias=False)
    layer = luqrun.quantize_model(nn.Linear(32, 6, bias=False), recipe, skip=())
    layer.load_state_dict(plain.state_dict())
    for each in (plain, layer):
        each(x).square().sum().backward()
    assert torch.equal(layer(x), plain(x))
    assert torch.equal(layer.weight.grad, plain.weight.grad)


# What cannot be


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"wgrad": {"hadamard": 12}}, r" quant\.wgrad\.hadamard=12 is not allowed; allowed: 2, 4, .*256, null$"),
        ({"fprop": {"hadamard": 1}}, r" quant\.fprop\.hadamard=1 is not allowed"),
        ({"fprop": {"hadamard": 512}}, r" quant\.fprop\.hadamard=512 is not allowed"),
        ({"fprop": {"hadamard": -16}}, r" quant\.fprop\.hadamard=-16 is not allowed"),
        ({"fprop": {"hadamard": True}}, r" quant\.fprop\.hadamard=True is not allowed"),
        ({"fprop": {"hadamard": 16.0}}, r" quant\.fprop\.hadamard=16\.0 is not allowed"),
        ({"fprop": {"hadamard": "16"}}, r" quant\.fprop\.hadamard='16' is not allowed"),
        ({"dgrad": {"signs": "drawn"}}, r" quant\.dgrad\.signs=drawn is of a rotation: set quant\.dgrad\.hadamard too"),
        ({"dgrad": {"hadamard": 16, "signs": "random"}}, r" quant\.dgrad\.signs=random.*none, fixed, drawn"),
        ({"hadamard": 16}, r"quant\.hadamard is not a key"),
        (
            {"activation": None, "weight": None, "fprop": {"hadamard": 16}},
            r" quant\.fprop\.hadamard=16 rotates for quantizers, of which fprop has none; set it to null$",
        ),
        ({"weight": {"hadamard": 16}}, r"quant\.weight\.hadamard.*no key"),
        (
            {"gradient": {"range": "hindsight"}, "wgrad": {"hadamard": 16}},
            r" quant\.wgrad\.hadamard does not go with range=hindsight of its gradient.*allowed: other ranges$",
        ),
    ],
    ids=str,
)
def test_mistakes_name_their_key(overrides, named):
    with pytest.raises(UserError, match=named):
        luqrun.recipe("luq", **overrides)


def test_a_rotation_is_shown():
    assert str(luqrun.recipe("nvfp4_nvidia")).endswith("wgrad=hadamard 16, signs fixed")
    assert "dgrad=hadamard 64, signs drawn" in str(luqrun.recipe("mxfp4_rht_sr"))
    assert "hadamard" not in str(luqrun.recipe("mxfp4"))
    assert "fprop=hadamard 32," in str(luqrun.recipe("quartet"))
    assert str(luqrun.recipe("quartet")).endswith(", trust mask")
