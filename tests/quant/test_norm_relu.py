"""A batch norm and the ReLU that alone reads it, in one forward pass: the same numbers, and whom it concerns."""

import copy
import pickle

import pytest
import torch
import torchvision.models as tv
from kernel_inputs import LAST, normal
from layers import LUQ, quantize
from torch import nn
from torch.utils.checkpoint import checkpoint

from luqrun.errors import UserError
from luqrun.internals.of_torch import has_hooks
from luqrun.quant.convert import quantize_model
from luqrun.quant.dataflow import only_readers
from luqrun.quant.kernels import reference
from luqrun.quant.kernels.cpu import backend as cpu
from luqrun.quant.norm import FusedBatchNorm2d
from luqrun.quant.relu import BatchNormReLUFunction, MaskedReLU, MaskedReLU6

ONE = BatchNormReLUFunction._backward_cls
# Sizes by the loops' own: less than a vector, rows and tasks that end within, several tasks; channels of no task (24).
SHAPES = ((2, 8, 1, 3), (3, 16, 7, 5), (2, 24, 5, 5), (5, 32, 33, 33), (3, 256, 17, 17), (2, 1024, 9, 9))


def same(found, expected):
    return all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("most", [None, 6.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_loops_give_the_bits_of_two_passes(shape, dtype, most):
    x = normal(*shape).to(dtype).to(memory_format=LAST)
    given = torch.rand(4, shape[1]).unbind()
    for moments in (None, False, True):
        ours, theirs = ([each.clone() for each in given] for _ in range(2))
        found, expected = (None, None) if moments is None else torch.ones(2, 4, dtype=torch.float64).unbind()
        one = cpu.batch_norm_relu(x, *ours, 0.1, 1e-5, most, found, bool(moments))
        two = reference.batch_norm_relu(x, *theirs, 0.1, 1e-5, most, expected, bool(moments))
        assert same((*one, *ours), (*two, *theirs))
        assert found is None or torch.equal(found, expected)


def test_a_nan_stays_one():
    x = torch.where(normal(3, 16, 4, 4) > 2, torch.nan, 1.0).to(memory_format=LAST)
    given = (None,) * 4
    for one, two in zip(cpu.batch_norm_relu(x, *given, 0, 1), reference.batch_norm_relu(x, *given, 0, 1), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0, equal_nan=True)


def network(relu=nn.ReLU, channels=16, **keys):
    torch.manual_seed(0)
    parts = [nn.Conv2d(3, channels, 3), nn.BatchNorm2d(channels), relu(**keys), nn.Conv2d(channels, 4, 3)]
    return nn.Sequential(*parts).to(memory_format=LAST).train()


def quantized(model, fuse=True):
    return quantize_model(model, LUQ, skip=(), fuse=fuse)


def images():
    return normal(5, 3, 9, 9).to(memory_format=LAST).requires_grad_()


def trained(model, call=None, steps=3):
    """Outputs, gradients and buffers."""
    found = []
    for _ in range(steps):
        x = images()
        output = (call or model)(x)
        output.square().sum().backward()
        found += [output.detach(), x.grad]
    return [*found, *(each.grad for each in model.parameters()), *model.buffers()]


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [16, 24])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("relu", [nn.ReLU, nn.ReLU6])
def test_a_training_has_the_same_bits_without(relu, inplace, channels, precision):
    found = []
    for fuse in (True, False):
        model = quantized(network(relu, channels, inplace=inplace), fuse)
        assert isinstance(model[1](model[0](images())).grad_fn, ONE) == fuse
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
            found.append(trained(model))
    assert same(*found)


def test_the_relu_returns_it_as_it_is():
    model = quantized(network())
    output = model[1](model[0](images()))
    assert output.min() == 0
    assert model[2](output) is output
    assert model[2](output) is not output  # only once: the next one is called anew


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed(reentrant):
    ones = [quantized(network(), fuse) for fuse in (True, False)]
    calls = [lambda x, one=one: one[3](checkpoint(one[:3], x, use_reentrant=reentrant)) for one in ones]
    assert same(*(trained(one, call) for one, call in zip(ones, calls, strict=True)))


def test_a_derivative_of_the_gradient():
    found = []
    for fuse in (True, False):
        model, x = quantized(network(), fuse), normal(5, 16, 4, 4).to(memory_format=LAST).requires_grad_()
        output = model[2](model[1](x))
        (first,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), [x, model[1].weight]))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_it_is_no_part_of_the_model():
    model, plain = quantized(network()), network()
    assert [name for name, _ in model.named_modules()] == [name for name, _ in plain.named_modules()]
    assert model.state_dict().keys() == plain.state_dict().keys()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other[1].relu_after is other[2]
        assert other[2] is not model[2]
    assert same(trained(copy.deepcopy(model)), trained(model))


def test_evaluation_and_no_gradient_keep_them_apart():
    model = quantized(network())
    with torch.no_grad():
        assert model[1](model[0](images())).min() < 0
    assert model.eval()[1](model[0](images())).min() < 0


HOOKS = {
    "forward": lambda norm, relu: norm.register_forward_hook(lambda *what: None),
    "of the ReLU": lambda norm, relu: relu.register_forward_pre_hook(lambda *what: None),
    "backward": lambda norm, relu: norm.register_full_backward_hook(lambda *what: None),
    "before backward": lambda norm, relu: relu.register_full_backward_pre_hook(lambda *what: None),
    "of all": lambda norm, relu: nn.modules.module.register_module_forward_hook(lambda *what: None),
}


@pytest.mark.parametrize("name", HOOKS)
def test_hooks_see_the_batch_norms_own_output(name):
    model = quantized(network())
    assert not has_hooks(model[1])
    hook = HOOKS[name](model[1], model[2])
    try:
        assert model[1](model[0](images())).min() < 0
    finally:
        hook.remove()
    assert model[1](model[0](images())).min() == 0


CHANGES = {
    "another activation": lambda model, x: model[3](nn.functional.gelu(model[1](model[0](x)))),
    "no activation": lambda model, x: model[1](model[0](x)),
    "a change in between": lambda model, x: model[2](model[1](model[0](x)).mul_(2)),
    "another ReLU": lambda model, x: quantize(nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU6()), LUQ)[1](
        model[1](model[0](x))
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_relu_that_does_not_follow_any_more_is_an_error(name):
    with pytest.raises(UserError, match="fuse=False"):
        CHANGES[name](quantized(network()), images()).sum().backward()
    CHANGES[name](quantized(network(), fuse=False), images()).sum().backward()


# Who reads whom


class Reads(nn.Module):
    """A batch norm whose output is read in a way."""

    def __init__(self, how):
        super().__init__()
        self.conv, self.norm, self.relu, self.other = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.ReLU6()
        self.how = how

    def forward(self, x):
        return self.how(self, self.conv(x))


class Options(Reads):
    def forward(self, x, features=False):
        y = self.norm(self.conv(x))
        return (self.relu(y), y) if features else self.relu(y)


READS = {
    "alone": (lambda m, x: m.relu(m.norm(x)), "relu"),
    "alone, a ReLU6": (lambda m, x: m.other(m.norm(x)) + 1, "other"),
    "a ReLU called elsewhere too": (lambda m, x: m.relu(m.norm(m.relu(x))), "relu"),
    "two readers": (lambda m, x: (lambda y: m.relu(y) + y)(m.norm(x)), None),
    "two ReLUs": (lambda m, x: (lambda y: m.relu(y) + m.other(y))(m.norm(x)), None),
    "returned": (lambda m, x: (lambda y: (m.relu(y), y))(m.norm(x)), None),
    "called twice": (lambda m, x: m.relu(m.norm(m.relu(m.norm(x)))), None),
    "a change in between": (lambda m, x: m.relu(m.norm(x) + 1), None),
    "a function": (lambda m, x: nn.functional.relu(m.norm(x)), None),
    "nobody": (lambda m, x: m.norm(x), None),
    "what cannot be traced": (lambda m, x: m.relu(m.norm(x)) if x.sum() > 0 else x, None),
}


@pytest.mark.parametrize("name", READS)
def test_who_alone_reads_a_batch_norm(name):
    how, reader = READS[name]
    model = quantized(Reads(how))
    expected = [] if reader is None else [(model.norm, getattr(model, reader))]
    assert only_readers(model, FusedBatchNorm2d, (MaskedReLU, MaskedReLU6)) == expected
    assert model.norm.relu_after is (None if reader is None else getattr(model, reader))


def test_the_last_call_decides():
    model = quantized(network())
    assert model[1].relu_after is model[2]
    model[3] = nn.Conv2d(16, 4, 3)
    assert quantized(model, fuse=False)[1].relu_after is None


def test_a_model_without_batch_norms_is_not_traced():
    calls = []

    class Counting(nn.Sequential):
        def forward(self, x):
            calls.append(x)
            return super().forward(x)

    quantized(Counting(nn.Linear(4, 4), nn.ReLU()))
    assert not calls
    quantized(Counting(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))
    assert calls


def test_a_forward_with_options_shows_nothing():
    assert quantized(Options(None)).norm.relu_after is None


def test_torchvisions_residual_network():
    """In each block the second batch norm's output is added to before its ReLU, and that of the shortcut has none."""
    model = quantized(tv.resnet18())
    joined = [name for name, each in model.named_modules() if getattr(each, "relu_after", None) is not None]
    blocks = [f"layer{stage}.{block}.bn1" for stage in (1, 2, 3, 4) for block in (0, 1)]
    assert joined == ["bn1", *blocks]
