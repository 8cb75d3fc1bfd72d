"""Each interface of torch that it does not promise still is what luqrun takes it for."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from luqrun.internals import of_torch


class Spy(torch.autograd.Function):
    """Notes what `look` returns in its forward and backward passes."""

    @staticmethod
    def forward(ctx, x, look, seen):
        ctx.look, ctx.seen = look, seen
        ctx.save_for_backward(x)  # what a checkpoint runs the forward again for
        seen.append(look())
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        ctx.saved_tensors  # noqa: B018
        ctx.seen.append(ctx.look())
        return g, None, None


def test_compilations_are_counted():
    double = torch.compile(lambda x: 2 * x, backend="eager")
    for x, more in ((torch.ones(3), 1), (torch.ones(3), 0), (torch.ones(3, 3), 1)):
        before = of_torch.compilations()
        double(x)
        assert of_torch.compilations() - before == more


def test_any_size_is_one_graph_but_for_sizes_of_one():
    graphs = []
    double = torch.compile(lambda x: 2 * x, backend=lambda graph, _: graphs.append(1) or graph.forward)
    for shape, known in (((3, 3), 1), ((4, 5), 1), ((1, 5), 2)):
        x = torch.rand(shape)
        of_torch.of_any_size(x)
        torch.testing.assert_close(double(x), 2 * x)
        assert len(graphs) == known


def test_a_backward_pass_is_known():
    seen, x = [], torch.ones(2, requires_grad=True)
    Spy.apply(x, of_torch.in_backward, seen).sum().backward()
    assert seen == [False, True]


@pytest.mark.parametrize(("reentrant", "again"), [(False, (True, False)), (True, (True, True))])
def test_a_repeated_forward_is_known(reentrant, again):
    seen, x = [], torch.ones(2, requires_grad=True)
    checkpoint(lambda x: Spy.apply(x, of_torch.repeats_forward, seen), x, use_reentrant=reentrant).sum().backward()
    assert seen[:2] == [(False, True), again]


def test_who_watches_is_known():
    assert not of_torch.is_watched()
    with FlopCounterMode(display=False):
        assert of_torch.has_modes()
        assert of_torch.is_watched()
    with torch.profiler.profile():
        assert of_torch.is_watched()
        assert not of_torch.has_modes()
    seen = []
    torch.jit.trace(lambda x: seen.append(of_torch.is_watched()) or x, torch.ones(1), check_trace=False)
    assert seen == [True]


def test_hooks_of_what_is_kept_are_known():
    seen, x = [], torch.ones(2, requires_grad=True)

    def forward(y):
        seen.append(of_torch.has_saved_hooks())
        return y.exp()

    forward(x)
    with torch.autograd.graph.saved_tensors_hooks(lambda y: y, lambda y: y):
        forward(x)
    checkpoint(forward, x, use_reentrant=False).sum().backward()
    assert seen == [False, True, True, True]


def test_tensors_whose_memory_holds_something_else_are_known():
    x = torch.ones(2, 3)
    assert of_torch.is_lazy(torch._neg_view(x))
    assert of_torch.is_lazy(torch._efficientzerotensor(2, 3))
    assert not any(map(of_torch.is_lazy, (x, -x, x.t(), torch._neg_view(x).clone(), torch.zeros(2))))


def test_transforms_are_known():
    seen = []
    torch.func.vmap(lambda x: seen.append(of_torch.is_transformed()) or x)(torch.ones(2))
    assert seen == [True]
    assert not of_torch.is_transformed()


def test_many_gradients_at_once_are_known():
    seen, x = [], torch.ones(2, requires_grad=True)
    x.register_hook(lambda gradient: seen.append(of_torch.is_batched(gradient)))
    torch.autograd.grad(x * 2, x, torch.ones(3, 2), is_grads_batched=True)
    torch.autograd.grad(x * 2, x, torch.ones(2))
    assert seen == [True, False]


def test_what_forward_mode_follows_is_known():
    x = torch.ones(2)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        assert of_torch.has_tangent(dual)
        assert not of_torch.has_tangent(x)
    assert not of_torch.has_tangent(x)


def test_tensors_that_wrap_others_are_known():
    jagged = torch.nested.nested_tensor([torch.rand(2), torch.rand(3)], layout=torch.jagged)
    assert of_torch.has_dispatch(jagged)
    for plain in (torch.ones(1), nn.Parameter(torch.ones(1)), nn.Buffer(torch.ones(1))):
        assert not of_torch.has_dispatch(plain)
        assert type(plain) in of_torch.PLAIN
        assert type(copy.deepcopy(plain)) in of_torch.PLAIN
    with torch._subclasses.FakeTensorMode():
        fake = torch.ones(1)
    assert type(fake) not in of_torch.PLAIN
    assert not of_torch.has_dispatch(fake)


def test_the_outermost_module_is_known():
    class Inner(nn.Module):
        def forward(self, x):
            seen.append(of_torch.outermost_module())
            return x

    seen = []
    outer = nn.Sequential(nn.Sequential(Inner()))
    outer(torch.ones(1))
    assert seen == [outer]
    assert of_torch.outermost_module() is None


@pytest.mark.parametrize(
    "ask",
    [
        lambda x: bool(x.sum() > 0),
        lambda x: x.tolist(),
        lambda x: x.numpy(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: torch.equal(x, x),
        lambda x: x[0].repeat_interleave(x[0].long()),
    ],
    ids=["item", "tolist", "numpy", "nonzero", "mask", "equal", "repeat"],
)
def test_who_asks_for_values_that_are_not_there_is_known(ask):
    with pytest.raises((RuntimeError, TypeError)) as error:
        ask(torch.empty(2, 3, device="meta"))
    assert of_torch.asks_for_values(error.value)


@pytest.mark.parametrize("fail", [lambda x: x @ x, lambda x: x.view(5), lambda x: nn.Module()(x), lambda x: x + "a"])
def test_what_fails_for_another_reason_is_not_taken_for_that(fail):
    with pytest.raises((RuntimeError, TypeError)) as error:
        fail(torch.empty(2, 3, device="meta"))
    assert not of_torch.asks_for_values(error.value)
