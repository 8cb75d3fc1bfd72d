"""Which schemes have unbiased dgrad and wgrad as a whole, and which not: the mean over draws of a layer's gradient
against the GEMM of what was drawn from.

A gradient is projected on the exact one and on random directions: each projection is a sum over many elements, and near
to normal. The z-tests of unbiasedness are one family (tests/README.md: 10^-4 that any of them fails when all is well;
`limit` widens the normal's quantile to Student's). A bias is shown by |z| > 12. Seeds are fixed.
"""

import pytest
import torch
from block_gemms import SEED, Expected
from torch import nn

import luqrun
from luqrun.quant.convert import set_step

DRAWS, DIRECTIONS = 256, 4
LAYERS = {
    "linear": (lambda: nn.Linear(48, 40, bias=False), (64, 48)),
    "conv": (lambda: nn.Conv2d(34, 40, (1, 2), groups=2, bias=False), (33, 34, 2, 3)),
    "whole": (lambda: nn.Linear(128, 128, bias=False), (128, 128)),
}
SCHEMES = ("luq", "luq_smp2", "mxfp4_rht_sr", "tetrajet", "nvfp4_46")
# MS-EDEN needs its rotation: the rest of a contraction is rotated in small groups, in which a bias begins to show.
UNBIASED = [*((scheme, name) for scheme in SCHEMES for name in ("linear", "conv")), ("quartet2", "whole")]
FAMILY = len(UNBIASED) * 2 * (DIRECTIONS + 1)
STOCHASTIC = {"gradient": {"rounding": "stochastic"}}
NO_EDEN = {
    "gradient": {"eden": False, "largest": None},
    "dgrad": {"weight": {"eden": False, "largest": None}},
    "wgrad": {"activation": {"eden": False, "largest": None}},
}
NO_ROTATION = {gemm: {"hadamard": None, "signs": None} for gemm in ("dgrad", "wgrad")}
BIASED = {  # by a case: scheme, what differs from it, layer, and between what the mean gain lies
    "mxfp4 with OCP's scale, stochastic": ("mxfp4", STOCHASTIC, "linear", (0.95, 0.99)),
    "nvfp4_nvidia": ("nvfp4_nvidia", {}, "whole", (0.98, 0.999)),
    "fp4_all_the_way": ("fp4_all_the_way", {}, "conv", (0.98, 0.998)),
    "luq_xi": ("luq_xi", {}, "linear", (0.89, 0.906)),
    "luq_supplement": ("luq_supplement", {}, "linear", (0.5, 0.99)),
    "quartet2 without eden": ("quartet2", NO_EDEN, "whole", (0.97, 0.99)),
}
GRADIENT_OF_THE_FORWARD = {  # whether dgrad and wgrad take, in the mean, what fprop took
    "luq": (True, True),
    "luq_smp2": (True, True),
    "mxfp4_rht_sr": (True, True),
    "tetrajet": (True, True),
    "quartet2": (True, True),
    "nvfp4_nvidia": (True, False),  # the weights have tiles, the activations blocks
    "nvfp4_46": (False, False),  # both are rounded anew, along the other axis
    "fp4_all_the_way": (False, False),  # wgrad draws from the activations themselves
}


def some_layer(name):
    torch.manual_seed(3)
    make, shape = LAYERS[name]
    layer, x = make(), torch.randn(shape)
    g = torch.randn(layer(x).shape) * torch.rand(layer(x).shape) ** 2
    return layer, x, g


def gradients(layer, x, g, recipe, draws=DRAWS):
    """dgrad and wgrad of so many steps, each (draws, elements), float64."""
    layer, x = luqrun.quantize_model(layer, recipe, skip=(), seed=SEED), x.clone().requires_grad_()
    found = []
    for step in range(draws):
        set_step(layer, step)
        found.append([each.flatten() for each in torch.autograd.grad(layer(x), (x, layer.weight), g)])
    return [torch.stack(each).double() for each in zip(*found, strict=True)]


def drawn(scheme, name, **changes):
    """By GEMM: the gradients of a scheme's draws, and the GEMM of what they were drawn from."""
    layer, x, g = some_layer(name)
    if scheme == "luq_supplement":
        g = torch.where(g > 0, g / 2, g)  # the largest one is negative
    recipe = luqrun.recipe(scheme, **changes)
    expected = Expected(layer, recipe, {"activation": x, "weight": layer.weight, "gradient": g}, mean=True)
    exact = [expected.product(gemm).flatten() for gemm in ("dgrad", "wgrad")]
    return dict(zip(("dgrad", "wgrad"), zip(gradients(layer, x, g, recipe), exact, strict=True), strict=True))


def projections(found, exact):
    """(draws, 1 + DIRECTIONS): the error of each draw along the exact gradient, as a share of it, and along others."""
    generator = torch.Generator().manual_seed(1)
    others = torch.randn(len(exact), DIRECTIONS, generator=generator, dtype=torch.float64)
    directions = torch.cat([exact[:, None], others / others.norm(dim=0) * exact.norm()], 1)
    return (found - exact) @ directions / exact.square().sum()


def z_of(errors):
    return errors.mean(0) / (errors.std(0) / len(errors) ** 0.5)


def limit(z):
    """The quantile of Student's distribution for DRAWS draws that goes with the normal distribution's."""
    return z + (z**3 + z) / (4 * (DRAWS - 1))


@pytest.mark.parametrize(("scheme", "name"), UNBIASED)
def test_unbiased(scheme, name, z_limit):
    for gemm, (found, exact) in drawn(scheme, name).items():
        errors = projections(found, exact)
        assert 1e-3 < errors[:, 0].std() < 0.03, gemm  # of one draw: a bias of a hundredth would be seen
        assert z_of(errors).abs().max() < limit(z_limit(FAMILY)), gemm
        # What is left of the error of one draw falls with the root of their number.
        left = (found.mean(0) - exact).norm() / ((found - exact).norm(dim=1).mean() / DRAWS**0.5)
        assert 0.8 < left < 1.2, gemm


@pytest.mark.parametrize("case", BIASED)
def test_biased(case):
    scheme, changes, name, (low, high) = BIASED[case]
    for gemm, (found, exact) in drawn(scheme, name, **changes).items():
        errors = projections(found, exact)
        assert low < 1 + errors[:, 0].mean() < high, gemm
        assert z_of(errors)[0] < -12, gemm


def test_ms_eden_is_biased_where_nothing_is_rotated():
    for found, exact in drawn("quartet2", "linear", **NO_ROTATION).values():
        assert z_of(projections(found, exact)).abs().max() > 12


@pytest.mark.parametrize("name", ["linear", "conv"])
@pytest.mark.parametrize("scheme", GRADIENT_OF_THE_FORWARD)
def test_whether_the_mean_is_the_gradient_of_the_quantized_forward(scheme, name):
    layer, x, g = some_layer(name)
    expected = Expected(
        layer, luqrun.recipe(scheme), {"activation": x, "weight": layer.weight, "gradient": g}, mean=True
    )
    forward = {operand: expected.operand("fprop", operand) for operand in ("activation", "weight")}
    exact = Expected(layer, luqrun.recipe("fp32"), {**forward, "gradient": g})
    for gemm, alike in zip(("dgrad", "wgrad"), GRADIENT_OF_THE_FORWARD[scheme], strict=True):
        mean, of_forward = expected.product(gemm), exact.product(gemm)
        assert torch.allclose(mean, of_forward, rtol=0, atol=1e-5 * of_forward.abs().max().item()) == alike, gemm
