"""Passes in one call under what else a program does: checkpoints, threads, watchers, graphs that are kept."""

import contextlib

import pytest
import torch
from int8_inputs import prepared_anew
from layer_passes import LAST, RECIPES, assert_alike, made, trained
from layers import quantize
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from luqrun.quant import sharing
from luqrun.quant.convert import set_step, unchanged_weights
from luqrun.quant.kernels.cpu import driver, int8_tiles, pass_kinds, sizes

pytestmark = pytest.mark.skipif(not int8_tiles.is_there(), reason="needs AVX-512 VNNI")


class Checkpointed(nn.Sequential):
    """Each layer in a checkpoint of its own."""

    def forward(self, x):
        for layer in self:
            x = checkpoint(layer, x, use_reentrant=False)
        return x


@pytest.mark.parametrize("few", [0, sizes.FEW])
def test_checkpoints(few, counted, blocks_win, monkeypatch):
    """Their second forward keeps what the first one kept, whatever has become known between the two."""
    monkeypatch.setattr(sizes, "FEW", few)
    for name in ("linear", "3 x 3"):
        layer, x = made(name)
        counted[:] = [0, 0]
        found = trained(Checkpointed(layer), x)
        assert counted == [0, 0]
        assert_alike(found, trained(layer, x))
    make, shape = lambda: nn.Conv2d(32, 32, 3, padding=1, groups=2), (2, 32, 6, 6)
    alike = quantize(Checkpointed(*(make() for _ in range(3))), RECIPES["luq"]).to(memory_format=LAST)
    trained(alike, torch.randn(shape).to(memory_format=LAST))  # a backward tells what the next one's forward asks


@pytest.mark.parametrize("first", [False, True], ids=["backward", "forward"])
@pytest.mark.parametrize("name", ["profiler", "weights that do not change"])
def test_checkpoints_of_which_one_pass_is_another(name, first, counted):
    layer, x = made("linear")
    around = {"profiler": torch.profiler.profile, "weights that do not change": lambda: unchanged_weights(layer)}[name]
    leaf = x.clone().requires_grad_()
    with around() if first else contextlib.nullcontext():
        y = checkpoint(layer, leaf, use_reentrant=False)
    with contextlib.nullcontext() if first else around():
        y.square().sum().backward()
    assert leaf.grad.isfinite().all()


def test_codes_of_another_tensor_are_not_held(counted, blocks_win, monkeypatch):
    small, large = quantize(nn.Linear(16, 4), RECIPES["luq"]), quantize(nn.Linear(40, 16), RECIPES["luq"])
    monkeypatch.setattr(pass_kinds, "MOST", 100)  # the first one calls its operators
    x = torch.randn(6, 40, requires_grad=True)
    y = small(large(x))
    assert counted == [1, 0]
    assert sharing._last.made is None
    y.sum().backward()


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (3, 2)])
@pytest.mark.parametrize("name", ["linear", "3 x 3"])
def test_a_backward_pass_has_the_threads_of_its_own_time(name, before, after, counted, monkeypatch):
    layer, x = made(name)
    expected = trained(layer, x, steps=1)
    used, told = [], driver.told_of
    monkeypatch.setattr(torch, "get_num_threads", lambda: before)
    monkeypatch.setattr(driver, "threads_for", lambda elements: before)
    prepared_anew()
    monkeypatch.setattr(driver, "told_of", lambda *loop: used.append(torch.get_num_threads()) or told(*loop))
    leaf = x.clone().requires_grad_()
    set_step(layer, 0)
    layer.zero_grad()
    y = layer(leaf)
    monkeypatch.setattr(torch, "get_num_threads", lambda: after)
    monkeypatch.setattr(driver, "threads_for", lambda elements: after)
    used.clear()
    y.backward(torch.linspace(-1, 1, y.numel()).sin().view(y.shape))
    assert set(used) == {after}  # its loops were told anew
    assert torch.equal(leaf.grad, expected[0])
    assert torch.equal(layer.weight.grad, expected[2])
    assert counted == [2, 2]


def test_who_watches_the_backward_pass_alone_sees_operators(counted, blocks_win, monkeypatch):
    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            seen.add(str(function))
            return function(*arguments, **(keywords or {}))

    for few in (sizes.FEW, 0):
        monkeypatch.setattr(sizes, "FEW", few)
        prepared_anew()
        for name in ("linear", "strided", "3 x 3"):
            layer, x = made(name)
            for _ in range(2):  # from here on it is known
                layer(x.clone().requires_grad_()).sum().backward()
            layer.zero_grad()
            gradients = []
            for watch in (False, True):
                seen = set()
                set_step(layer, 5)
                leaf = x.clone().requires_grad_()
                counted[:] = [0, 0]
                y = layer(leaf).sum()
                if watch:
                    with Names():
                        y.backward()
                    assert "luqrun.quantize.default" in seen
                else:
                    y.backward()
                assert counted == [1, int(not watch)]
                gradients.append([leaf.grad, layer.weight.grad])
                layer.weight.grad = None
            assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


def test_a_graph_that_is_kept_gives_its_gradients_again(counted):
    layer, x = made("3 x 3")
    output = layer(x.requires_grad_()).square().sum()
    first = torch.autograd.grad(output, [x, layer.weight], retain_graph=True)
    assert_alike(torch.autograd.grad(output, [x, layer.weight]), first)
    assert counted == [1, 2]
