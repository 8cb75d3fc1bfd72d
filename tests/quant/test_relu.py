"""MaskedReLU and MaskedReLU6: the numbers and the manners of nn.ReLU and nn.ReLU6, for one bit an element."""

import copy
import io
import math
from itertools import product

import pytest
import torch
from kernel_inputs import LAST, assert_identical, normal
from layers import LUQ, quantize, same
from test_kernels import RELU_EDGES
from torch import nn
from torch.utils.checkpoint import checkpoint

import luqrun
from luqrun.quant.convert import quantize_model
from luqrun.quant.kernels.layout import is_channels_last
from luqrun.quant.recipe import Recipe
from luqrun.quant.relu import MaskedReLU, MaskedReLU6

INPUTS = {
    "vector": normal(1031),
    "edges": torch.tensor(RELU_EDGES * 3),
    "rows": normal(5, 7),
    "image": normal(3, 5, 7, 5),
    "channels_last": normal(3, 5, 7, 5).to(memory_format=LAST),
    "volume": normal(2, 3, 4, 5, 2),
    "slice": normal(9, 10)[:, ::2],
    "transposed": normal(9, 10).t(),
    "cropped": normal(2, 6, 4, 4).to(memory_format=LAST)[:, :3],
    "expanded": normal(5, 1).expand(5, 6),
    "one": normal(1),
    "scalar": -normal(1)[0],
    "empty": normal(0, 3),
}


def forward_and_backward(relu, x, g):
    """Output, input afterwards and gradient. What is changed in place is no leaf, and dense."""
    leaf = x.detach().requires_grad_()
    middle = leaf * 1 if relu.inplace else leaf  # NaN and -0 stay
    output = relu(middle)
    output.backward(g)
    return output.detach(), middle.detach(), leaf.grad


@pytest.mark.parametrize(("ours", "torchs"), [(MaskedReLU, nn.ReLU), (MaskedReLU6, nn.ReLU6)])
@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_numbers_of_torchs(name, dtype, ours, torchs):
    x = (4 * INPUTS[name]).to(dtype)
    g = normal(*x.shape, seed=2).to(dtype)
    for inplace, grad in product(
        (False, True), (g, g[..., :1].expand(x.shape) if x.dim() else g, torch.full_like(g, torch.nan))
    ):
        found = forward_and_backward(ours(inplace), x, grad)
        expected = forward_and_backward(torchs(inplace), x, grad)
        if torchs is nn.ReLU6:  # whose gradient passes some NaN, and not others
            expected = (*expected[:2], torch.where(x.isnan(), found[2], expected[2]))
        for left, right in zip(found, expected, strict=True):
            assert left.dtype == dtype
            torch.testing.assert_close(left, right, rtol=0, atol=0, equal_nan=True)
        assert not (found[0] < 0).any()


def test_memory_format_and_identity():
    for x in (INPUTS["image"], INPUTS["channels_last"]):
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        output = MaskedReLU()(leaf)
        assert is_channels_last(output) == is_channels_last(x)
        assert output.data_ptr() != leaf.data_ptr()
        assert torch.equal(leaf, x)
        middle = leaf * 1
        output = MaskedReLU(inplace=True)(middle)
        assert output.data_ptr() == middle.data_ptr()
        assert torch.equal(middle, x.relu())
        # A gradient in another memory format than the output's.
        other = torch.contiguous_format if is_channels_last(x) else LAST
        g = normal(*x.shape, seed=3).contiguous(memory_format=other)
        (gradient,) = torch.autograd.grad(output, leaf, g)
        assert torch.equal(gradient, torch.where(x > 0, g, 0))


def saved_bytes(relu, x):
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.untyped_storage().nbytes()), lambda t: t):
        relu(x)
    return sum(sizes)


@pytest.mark.parametrize("masked", [MaskedReLU, MaskedReLU6])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bit_an_element_is_kept(dtype, inplace, masked):
    for shape in ((4, 8, 16, 16), (1031,), (3, 5, 7, 5)):
        x = torch.randn(shape, dtype=dtype, requires_grad=True) * 1
        assert saved_bytes(masked(inplace), x) == math.ceil(x.numel() / 8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes_are_left_to_torch(dtype):
    output = MaskedReLU()(torch.randn(9, dtype=dtype, requires_grad=True))
    assert "MaskedReLU" not in type(output.grad_fn).__name__


def test_nothing_is_kept_without_a_backward_pass():
    x = torch.randn(9, requires_grad=True)
    with torch.no_grad():
        assert MaskedReLU()(x).grad_fn is None
    assert MaskedReLU()(x.detach()).grad_fn is None
    assert torch.equal(MaskedReLU()(x.detach()), x.detach().relu())


@pytest.mark.parametrize(
    "view", [lambda x: x[:, 1:3], lambda x: x[2:], lambda x: x.t()[3:]], ids=["columns", "rows", "t"]
)
def test_a_view_is_changed_in_place_with_its_base(view):
    results = []
    for relu in (MaskedReLU(inplace=True), nn.ReLU(inplace=True)):
        leaf = normal(4, 6).requires_grad_()
        base = leaf * 1
        relu(view(base))  # what it returns is not used
        (base + 1).sin().sum().backward()
        results.append((base.detach(), leaf.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_what_nn_relu_refuses_is_refused():
    for relu in (MaskedReLU(inplace=True), nn.ReLU(inplace=True)):
        with pytest.raises(RuntimeError, match="leaf"):
            relu(torch.randn(3, requires_grad=True))
        x = torch.randn(3, requires_grad=True)
        middle = x.exp()  # keeps its output
        relu(middle)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            middle.sum().backward()


@pytest.mark.parametrize("last", [False, True])
def test_a_second_derivative_is_that_of_a_plain_relu(last):
    x = torch.randn(2, 3, 4, 5)
    x[0, 0, 0, 0] = torch.inf
    x = (x.to(memory_format=torch.channels_last) if last else x).requires_grad_()
    found = []
    for relu in (nn.ReLU(), MaskedReLU()):
        (gradient,) = torch.autograd.grad(relu(x.sin()).square().sum(), x, create_graph=True)
        found.append((gradient, *torch.autograd.grad(gradient.nan_to_num().square().sum(), x)))
    assert all(torch.equal(one.nan_to_num(7), other.nan_to_num(7)) for one, other in zip(*found, strict=True))


def test_torch_func_takes_a_masked_relu_as_a_plain_one():
    x, found = torch.randn(3, 4), []
    for relu in (nn.ReLU(), MaskedReLU()):
        gradient = torch.func.grad(lambda x, relu=relu: relu(x.sin()).square().sum())
        found.append((gradient(x), torch.func.vmap(gradient)(x), torch.func.jacrev(gradient)(x)))
    assert same(*found)


def test_many_gradients_at_once_and_forward_mode_are_those_of_a_plain_relu():
    x, many, found = torch.randn(3, 4, requires_grad=True), torch.randn(2, 3, 4), []
    for relu in (nn.ReLU(), MaskedReLU()):
        (gradients,) = torch.autograd.grad(relu(x.sin()), x, many, is_grads_batched=True)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, many[0])
            tangent = torch.autograd.forward_ad.unpack_dual(relu(dual.sin())).tangent
        found.append((gradients, tangent))
    assert same(*found)


def test_one_module_used_twice_and_checkpointed():
    plain = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
    masked = copy.deepcopy(plain)
    masked[1].__class__ = MaskedReLU
    x, gradients = torch.randn(4, 6), []
    for model in (plain, masked):
        for run in (model, lambda y, model=model: checkpoint(model, y, use_reentrant=False)):
            model.zero_grad()
            run(run(x)).sin().sum().backward()
            gradients.append(model[0].weight.grad.clone())
    for each in gradients[1:]:
        assert torch.equal(each, gradients[0])


def test_compiled_it_is_nn_relu():
    torch._dynamo.reset()
    graphs = []

    def backend(graph, _):
        graphs.append(graph.code)
        return graph

    x = torch.randn(9, requires_grad=True)
    output = torch.compile(MaskedReLU(), backend=backend, fullgraph=True)(x)
    assert "MaskedReLU" not in type(output.grad_fn).__name__
    assert "relu" in "".join(graphs)
    assert "luqrun" not in "".join(graphs)


# In a model


class Own(nn.ReLU):
    def forward(self, x):
        return super().forward(x) + 1


def model_with_relus():
    return nn.ModuleDict(
        {
            "a": nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True)),
            "b": nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.ReLU6(), Own()),
        }
    )


def test_quantize_model_keeps_each_relu_its_hooks_and_its_settings():
    model, calls = model_with_relus(), []
    relu = model["a"][1]
    relu.register_forward_pre_hook(lambda *_: calls.append("pre"))
    relu.register_forward_hook(lambda *_: calls.append("forward"))
    model["b"][1].register_full_backward_hook(lambda *_: calls.append("backward"))
    model.eval()
    keys, shown = list(model.state_dict()), repr(relu)
    quantize_model(model, LUQ, skip=())
    assert model["a"][1] is relu
    assert type(relu) is MaskedReLU
    assert isinstance(relu, nn.ReLU)
    assert relu.inplace
    assert not model["b"][1].inplace
    assert not relu.training
    assert [type(module) for module in model["b"]][2:] == [MaskedReLU6, Own]
    assert list(model.state_dict()) == keys
    assert repr(relu) == shown.replace("ReLU", "MaskedReLU")
    model["b"](model["a"](torch.randn(2, 4))).sum().backward()
    assert calls == ["pre", "forward", "backward"]


def test_a_model_of_which_nothing_is_quantized_keeps_its_relus():
    for recipe, skip in ((Recipe.of("fp32"), ()), (LUQ, ("*",))):
        model = model_with_relus()
        if skip:
            with pytest.warns(UserWarning, match="skip"):
                quantize_model(model, recipe, skip=skip)
        else:
            quantize_model(model, recipe, skip=skip)
        assert type(model["a"][1]) is nn.ReLU


def test_copies_and_files_of_a_model():
    model, x = quantize(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))), torch.randn(3, 4)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert type(twin[1]) is MaskedReLU
        assert torch.equal(twin(x), model(x))
    luqrun.set_finetune(model, True)
    model(x).sum().backward()
    assert model[0].weight.grad.isfinite().all()


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
def test_a_relu_straight_after_a_quantized_layer(inplace, channels_last):
    """Whose output is the layer's own memory, and not a view."""
    x = torch.randn(2, 3, 6, 6).to(memory_format=LAST if channels_last else torch.contiguous_format)
    for layer, inputs in (
        (nn.Conv2d(3, 4, 3, bias=False), x),
        (nn.Conv2d(3, 4, 3), x),
        (nn.Linear(6, 5, bias=False), x),
        (nn.Linear(6, 5), x[0, 0]),
    ):
        gradients = []
        for relu in (nn.ReLU(inplace), MaskedReLU(inplace)):
            quantized = quantize(copy.deepcopy(layer))
            output = relu(quantized(inputs))
            output.square().sum().backward()
            gradients.append(quantized.weight.grad)
        assert_identical(gradients[1], gradients[0])
