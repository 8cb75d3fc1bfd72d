"""What is found of a tensor where it is made: the same numbers, found only where somebody reads them."""

import pytest
import torch
from kernel_inputs import LAST, assert_identical, normal
from layers import LUQ, quantize
from torch import nn

from luqrun.quant import measured, quantizer
from luqrun.quant.kernels import ops, reference
from luqrun.quant.kernels.cpu import backend as cpu
from luqrun.quant.measured import Wish, remember, statistics_of, wish_of
from luqrun.quant.norm import FusedBatchNorm2d
from luqrun.quant.relu import MaskedReLU


@pytest.fixture
def known(monkeypatch):
    """Whether each quantization was told the statistics of its tensor."""
    seen, right = [], ops.quantize

    def quantize(*arguments):
        seen.append(arguments[-1] is not None)
        return right(*arguments)

    monkeypatch.setattr(quantizer.ops, "quantize", quantize)
    return seen


def network():
    torch.manual_seed(0)
    parts = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.Conv2d(16, 24, 3), nn.ReLU()
    parts = *parts, nn.Conv2d(24, 8, 3), nn.BatchNorm2d(8)
    return quantize(nn.Sequential(*parts), LUQ).to(memory_format=torch.channels_last)


def trained(steps=3):
    model, found = network(), []
    for step in range(steps):
        x = normal(4, 3, 12, 12, seed=step).to(memory_format=LAST)
        output = model(x)
        output.square().mean().backward()
        found += [output.detach(), *(p.grad.clone() for p in model.parameters())]
    return found


@pytest.mark.usefixtures("by_operators")
def test_the_numbers_are_the_same_and_found_from_the_second_pass_on(known, monkeypatch):
    found, told = trained(), list(known)
    monkeypatch.setattr(measured.Wish, "begin", lambda self, *how, **keys: None)
    for one, other in zip(found, trained(), strict=True):
        assert_identical(one, other)
    # A pass: activation and weight of three layers, then their gradients from the last one on. The input is nobody's,
    # and the second layer's gradient comes from a ReLU, which does not measure it.
    assert told == [False] * 9 + [False, False, True, False, True, False, True, False, True] * 2


def test_nothing_is_found_that_nobody_reads(known):
    relu, x = MaskedReLU(), normal(2, 8, 4, 4).requires_grad_()
    wish = wish_of(relu)
    output = relu(x)
    assert statistics_of(output, True) is None  # but now somebody asked
    assert wish.moments is True
    output = relu(x)
    assert wish.moments is None
    assert_identical(statistics_of(output, True), reference.statistics(output, True))
    relu(x)
    output = relu(x)  # the one before was not read
    assert statistics_of(output, True) is None


def made(moments):
    """A ReLU's output, with statistics."""
    relu, x = MaskedReLU(), normal(2, 8, 4, 4).requires_grad_()
    wish_of(relu).moments = moments
    return relu(x)


def test_it_serves_a_reader_once_and_while_nothing_changed():
    output = made(True)
    assert statistics_of(output * 1, True) is None
    assert statistics_of(output, True) is not None
    assert statistics_of(output, True) is None
    output = made(True)
    with torch.no_grad():
        output.mul_(2)
    assert statistics_of(output, True) is None
    assert statistics_of(made(True)[:1], True) is None


def test_moments_are_found_again_where_they_were_not_asked_for():
    sawb = quantizer.quantizer(format="int4", range="sawb")
    for moments in (False, True):
        output = made(moments)
        for one, other in zip(sawb.measure(output), sawb.measure(output * 1), strict=True):
            assert_identical(one, other)


def test_another_tensor_at_the_same_place_is_another():
    remember(normal(8), Wish(), (torch.ones(4, dtype=torch.float64), True))  # freed at once
    assert statistics_of(normal(8), True) is None


def test_a_wish_lives_as_long_as_its_module():
    before = len(measured._wishes)
    norm = FusedBatchNorm2d(8)
    assert wish_of(norm) is wish_of(norm)
    assert len(measured._wishes) == before + 1
    del norm
    assert len(measured._wishes) == before


VALUES = {
    "usual": normal(5, 24, 7, 5).to(memory_format=LAST),
    "large": normal(3, 30000),
    "one": normal(1),
    "tail": normal(7, 13),
    "NaN": torch.tensor([1.0, float("nan"), -float("nan"), -2.0] * 9),
    "Inf": torch.tensor([-float("inf"), 2.0, float("inf"), 3.0, -1.0]),
    "negative": -normal(40).abs(),
    "none": normal(0, 4),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("moments", [False, True])
@pytest.mark.parametrize("most", [None, 1.5])
@pytest.mark.parametrize("x", VALUES.values(), ids=VALUES)
def test_a_relu_measures_what_it_leaves(x, most, moments, dtype):
    ours, theirs = (x.to(dtype, copy=True) for _ in range(2))
    found, expected = torch.ones(2, 4, dtype=torch.float64).unbind()
    assert_identical(cpu.relu_(ours, most, found, moments), reference.relu_(theirs, most, expected, moments))
    assert_identical(ours, theirs)
    assert_identical(found, expected)


def test_a_default_device_does_not_matter():
    found = trained()
    model, others = network(), []
    for step in range(3):
        x = normal(4, 3, 12, 12, seed=step).to(memory_format=LAST)
        with torch.device("meta"):
            output = model(x)
            output.square().mean().backward()
        others += [output.detach(), *(p.grad.clone() for p in model.parameters())]
    for one, other in zip(found, others, strict=True):
        assert_identical(one, other)


def test_on_a_gpu_nothing_is_found_on_the_way():
    wish = Wish()
    wish.moments = True
    assert wish.begin(torch.empty(2, device="meta")) is None
    assert wish.moments is None
    wish.moments = True
    assert wish.begin(normal(2), can_do_moments=False) is None
