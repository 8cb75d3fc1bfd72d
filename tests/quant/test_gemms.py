"""The GEMMs of layers in int8 and in floating point: the same results, and what each keeps of torch's behaviour."""

import copy
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from kernel_inputs import assert_identical
from layers import E3M0, INT4, LUQ, quantize
from torch import nn

import luqrun
from luqrun.quant import function, gemms, kernels
from luqrun.quant.gemms import ConvOp, LinearOp
from luqrun.quant.kernels import ops
from luqrun.quant.kernels.cpu import int8, int8_library, int8_tiles
from luqrun.quant.kernels.layout import is_channels_last
from luqrun.quant.quantizer import Quantizer
from luqrun.quant.recipe import Recipe

LAST = torch.channels_last
LAYERS = {
    "linear": (lambda: nn.Linear(40, 24), (33, 40)),
    "linear, 4-d": (lambda: nn.Linear(12, 9, bias=False), (2, 3, 4, 12)),
    "linear, one row": (lambda: nn.Linear(12, 9), (12,)),
    "linear, no rows": (lambda: nn.Linear(12, 9), (0, 12)),
    "linear, one feature": (lambda: nn.Linear(1, 1), (5, 1)),
    "3 x 3": (lambda: nn.Conv2d(8, 16, 3, padding=1), (3, 8, 9, 10)),
    "3 x 3, odd channels": (lambda: nn.Conv2d(5, 3, 3, bias=False), (2, 5, 9, 10)),
    "strided": (lambda: nn.Conv2d(8, 4, 3, stride=2, padding=1), (3, 8, 9, 10)),
    "uneven": (lambda: nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(2, 0), dilation=(1, 2)), (2, 4, 9, 10)),
    "dilated": (lambda: nn.Conv2d(4, 8, 3, dilation=2, padding=1), (2, 4, 9, 10)),
    "tall": (lambda: nn.Conv2d(4, 8, (5, 1), padding=(2, 0)), (2, 4, 9, 10)),
    "groups": (lambda: nn.Conv2d(8, 8, 3, padding=1, groups=2), (2, 8, 9, 10)),
    "strided groups": (lambda: nn.Conv2d(6, 12, 3, 2, padding=1, groups=3), (2, 6, 9, 10)),
    "groups that fill vectors": (lambda: nn.Conv2d(32, 64, 3, 2, padding=1, groups=4), (2, 32, 9, 10)),
    "depthwise": (lambda: nn.Conv2d(9, 9, 3, padding=1, groups=9), (2, 9, 9, 10)),
    "pointwise": (lambda: nn.Conv2d(8, 16, 1), (3, 8, 9, 10)),
    "pointwise, strided": (lambda: nn.Conv2d(8, 16, 1, stride=2), (3, 8, 9, 10)),
    "more padding than kernel": (lambda: nn.Conv2d(8, 4, (1, 3), padding=(1, 3)), (2, 8, 9, 10)),
    "no images": (lambda: nn.Conv2d(8, 4, 3), (0, 8, 9, 10)),
}
every_layer = pytest.mark.parametrize("name", LAYERS)
SMP2 = Recipe.of("smp2", INT4, INT4, Quantizer("e3m0", rounding="stochastic", samples=2))
RECIPES = {
    "luq": LUQ,
    "smp2": SMP2,  # whose sums leave int8
    "smp4": Recipe.of("smp4", INT4, INT4, Quantizer("e3m0", rounding="stochastic", samples=4), samples_scope="both"),
    "int4": Recipe.of("int4", *[Quantizer("int4", rounding="stochastic", samples=n) for n in (1, 1, 3)]),
    # Codes that leave int8: those of tensors without a negative value, and large powers of two.
    "int8": Recipe.of("int8", Quantizer("int8"), Quantizer("int8"), Quantizer("int8")),
    "e4m0": Recipe.of("e4m0", Quantizer("e4m0"), Quantizer("e3m0_div128"), Quantizer("e4m0", rounding="stochastic")),
    "weights": Recipe.of("weights", weight=INT4),
    "no gradient": Recipe.of("forward", INT4, INT4),
    "no activation": Recipe.of("weights and gradients", weight=INT4, gradient=E3M0),
}


@pytest.fixture
def dense(monkeypatch):
    """dense(True): GEMMs in floating point from here on; dense(False): in int8."""
    return lambda wanted: monkeypatch.setitem(gemms._int8_devices, "cpu", not wanted)


def trained(layer, x, g, bf16=False):
    """Output, dgrad and the gradients of the parameters."""
    layer, x = copy.deepcopy(layer), x.clone(memory_format=torch.preserve_format).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        output = layer(x)
    output.backward(g(output))
    return [output.detach(), x.grad, *(parameter.grad for parameter in layer.parameters())]


def gradient_like(output):
    g = torch.randn(output.shape, generator=torch.Generator().manual_seed(4)) * 1e-3
    return g.to(output.dtype).to(memory_format=LAST if is_channels_last(output) else torch.contiguous_format)


def close(found, expected, tolerance):
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    if expected.numel():
        difference = (found.double() - expected.double()).abs().max()
        assert difference <= tolerance * expected.double().abs().max()


@every_layer
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_both_routes_give_the_same(name, recipe, dense):
    make, shape = LAYERS[name]
    layer = quantize(make(), recipe)
    signed = torch.randn(shape)
    inputs = [signed, signed.abs()]
    if signed.dim() == 4 and isinstance(layer, nn.Conv2d):
        inputs.append(signed.to(memory_format=LAST))
    for x, bf16 in product(inputs, (False, True)):
        dense(False)
        found = trained(layer, x, gradient_like, bf16)
        dense(True)
        expected = trained(layer, x, gradient_like, bf16)
        if not bf16:
            assert torch.equal(found[0], expected[0])
        for left, right in zip(found, expected, strict=True):
            close(left, right, 2**-6 if bf16 else 2e-6)  # bf16: of the result, of its sum with the bias, or of both
            assert is_channels_last(left) == is_channels_last(right)


@pytest.mark.usefixtures("by_operators")
def test_int8_is_what_runs(monkeypatch, dense):
    used = []
    for name in ("int8_conv", "int8_conv_dgrad", "int8_conv_wgrad", "int8_linear", "int8_linear_wgrad"):
        real = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *how, real=real, name=name: used.append(name) or real(*how))
    for name, expected in (
        ("linear", ["int8_linear", "int8_linear", "int8_linear_wgrad"]),
        ("3 x 3", ["int8_conv", "int8_conv_dgrad", "int8_conv_wgrad"]),
        ("strided", ["int8_conv", "int8_conv_dgrad", "int8_conv_wgrad"]),
    ):
        make, shape = LAYERS[name]
        for wanted in (False, True):
            used.clear()
            dense(wanted)
            trained(quantize(make()), torch.randn(shape), gradient_like)
            assert used == ([] if wanted else expected)


@pytest.mark.usefixtures("by_operators")
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.skipif(not int8_tiles.is_there(), reason="needs AVX-512 VNNI")
@pytest.mark.parametrize("name", ["groups", "strided groups", "depthwise", "groups that fill vectors"])
def test_groups_are_tried_in_int8_and_in_floats_and_give_the_same(name, last, monkeypatch, dense):
    dense(False)
    make, shape = LAYERS[name]
    layer, x = quantize(make()), torch.randn(shape)
    x, seen, found = x.to(memory_format=LAST) if last else x, [], []
    for taken in ("int8", "floating point"):

        def take(key, routes, taken=taken):
            seen.append((key[0], *routes))
            return routes[taken]()

        monkeypatch.setattr(function, "fastest", take)
        found.append(trained(layer, x, gradient_like))
    assert set(seen) == {(gemm, "int8", "floating point") for gemm in ("fprop", "dgrad", "wgrad")}
    for one, other in zip(*found, strict=True):
        assert_identical(one, other)


def test_codes_that_int8_does_not_hold_are_multiplied_in_fp32_under_bf16(monkeypatch, dense):
    """As a gradient comes where int8 units would be taken if its codes fitted: bf16 would round the product twice."""
    dense(False)
    seen, real = [], LinearOp.dgrad
    monkeypatch.setattr(LinearOp, "dgrad", lambda op, g, *rest: seen.append(g.dtype) or real(op, g, *rest))
    make, shape = LAYERS["linear"]
    trained(quantize(make(), luqrun.recipe("radix4_tpr")), torch.randn(shape), gradient_like, bf16=True)
    assert seen == [torch.float32]


def test_formats_without_kernels_or_int8_units_are_named(dense):
    dense(False)
    plain = gemms.describe("cpu")
    assert gemms.describe("cpu", luqrun.recipe("luq").encodings) == plain
    radix4 = "e3m0_radix4 quantized in torch operations, GEMMs with e3m0_radix4 in floating point"
    assert gemms.describe("cpu", luqrun.recipe("radix4_tpr").encodings) == f"{plain}, {radix4}"
    wide = Recipe.of("wide", INT4, INT4, Quantizer("e4m0", rounding="stochastic"))
    assert gemms.describe("cpu", wide.encodings) == f"{plain}, GEMMs with e4m0 in floating point"


def test_the_units_are_chosen_by_device_and_backend(monkeypatch):
    for fast, backend, expected in ((True, "cpu", True), (False, "cpu", False), (True, "reference", False)):
        monkeypatch.setattr(gemms, "_int8_devices", {})
        monkeypatch.setattr(int8, "is_fast", lambda fast=fast: fast)
        module = type("Backend", (), {"__name__": kernels.MODULES[backend]})()
        monkeypatch.setattr(gemms, "backend_for", lambda device_type, module=module: module)
        assert gemms.use_int8("cpu") is expected
        assert gemms.use_int8("cuda") is False
        assert ("int8" in gemms.describe("cpu")) is expected


def test_sums_that_int32_cannot_hold_are_left_to_floating_point():
    long, short = int8.CHUNK_ROWS + 1, int8.CHUNK_ROWS
    assert LinearOp().int8_pays((8, long)) == (False, True, True)
    assert LinearOp().int8_pays((long, 8)) == (True, False, True)
    assert LinearOp().int8_pays((short, short)) == (True, True, True)
    op = ConvOp((1, 1), (0, 0), (1, 1), 1)
    assert op.int8_pays((8, long // 9 + 1, 3, 3)) == (False, True, True)
    assert op.int8_pays((long // 9 + 1, 8, 3, 3)) == (True, False, True)
    assert op.int8_pays((short // 9, short // 9, 3, 3)) == (True, True, True)
    # 200,000 products of 127 * 127 are 3.2e9.
    layer = quantize(nn.Linear(200_000, 1, bias=False), RECIPES["int8"])
    with torch.no_grad():
        layer.weight.fill_(-1.0)
    x = torch.ones(2, 200_000)
    x[1] = -1.0
    torch.testing.assert_close(layer(x), torch.tensor([[-2e5], [2e5]]), rtol=1e-3, atol=0)


ROUTES = pytest.mark.parametrize("route", [False, True], ids=["int8", "dense"])


@ROUTES
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Linear(4, 3), (2, 5)),
        (lambda: nn.Linear(4, 3), (2, 2)),
        (lambda: nn.Conv2d(3, 4, 3), (2, 3, 2, 5)),
        (lambda: nn.Conv2d(3, 4, 3, dilation=3), (2, 3, 6, 9)),
        (lambda: nn.Conv2d(3, 4, 3), (2, 4, 6, 6)),
    ],
    ids=["too wide", "too narrow", "too small", "too small for its dilation", "wrong channels"],
)
def test_wrong_shapes_are_refused_as_torch_does(make, shape, route, dense):
    dense(route)
    plain, x = make(), torch.randn(shape)
    with pytest.raises(RuntimeError) as expected:
        plain(x)
    with pytest.raises(RuntimeError) as found:
        quantize(plain)(x)
    assert str(found.value).split("mm: ")[-1] == str(expected.value).split("mm: ")[-1]  # without a bias addmm is mm


@ROUTES
@pytest.mark.parametrize("name", ["linear", "linear, 4-d", "3 x 3", "pointwise", "strided"])
def test_outputs_may_be_changed_in_place(name, route, dense):
    dense(route)
    make, shape = LAYERS[name]
    layer = make()
    layer.bias = None
    layer, x = quantize(layer), torch.randn(shape)
    found = []
    for change in (lambda y: y.relu_(), lambda y: F.relu(y), lambda y: y.add_(1).sub_(1).relu_()):
        twin = copy.deepcopy(layer)
        change(twin(x)).sum().backward()
        found.append(twin.weight.grad)
    assert torch.equal(found[0], found[1])
    close(found[2], found[1], 1e-4)


@ROUTES
@pytest.mark.parametrize("name", ["3 x 3", "strided", "pointwise, strided", "more padding than kernel"])
def test_large_convolutions_take_the_direct_route(name, route, dense, monkeypatch):
    dense(route)
    make, shape = LAYERS[name]
    layer, x = quantize(make()), torch.randn(shape)
    expected = trained(layer, x, gradient_like)
    monkeypatch.setattr(int8_library, "prefers_direct", lambda patches, channels: True)
    found = trained(layer, x, gradient_like)
    assert torch.equal(found[0], expected[0])
    for left, right in zip(found, expected, strict=True):
        close(left, right, 2e-6)


@ROUTES
def test_a_whole_model_trains(route, dense):
    dense(route)
    layers = nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.Flatten(), nn.Linear(392, 3)
    model = luqrun.quantize_model(nn.Sequential(*layers), SMP2, skip=())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    x, labels = torch.randn(24, 1, 16, 16), torch.arange(24) % 3
    x += labels.view(-1, 1, 1, 1)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("padding", [(0, 0), (1, 2)])
@pytest.mark.parametrize("size", [(12, 8), (10, 7), (1, 1)])
def test_onednn_gets_no_stride_for_thin_pointwise_weight_gradients(size, padding, monkeypatch):
    # It writes beyond its memory for them; what it computes is right.
    op, real, strides = ConvOp((3, 2), padding, (1, 1), 1), torch.ops.aten.convolution_backward, []
    a, w = torch.randint(-7, 8, (2, 7, *size)).to(memory_format=LAST), torch.zeros(5, 7, 1, 1).long()
    g = torch.randint(-7, 8, F.conv2d(a, w, None, op.stride, padding).shape)
    monkeypatch.setattr(torch.ops.aten, "convolution_backward", lambda *how: strides.append(how[4]) or real(*how))
    found = op.wgrad(g.float().to(memory_format=LAST), a.float(), w.shape)
    expected = F.conv2d(
        F.pad(a, (padding[1],) * 2 + (padding[0],) * 2).transpose(0, 1), g.transpose(0, 1), None, 1, 0, (3, 2)
    )
    assert torch.equal(found, expected[:, :, :1, :1].transpose(0, 1).float())
    assert strides == [(1, 1)]
