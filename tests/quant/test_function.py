"""The three GEMMs: integers bit for bit, dequantized operands, re-sampling, expectation, dtypes, NaN and Inf."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import luqrun
from luqrun.quant.kernels.philox import make_stream, of_gemm
from luqrun.quant.plan import exponent_counts
from luqrun.quant.quantizer import Quantizer
from luqrun.quant.recipe import OPERANDS, Recipe

INT4 = Quantizer("int4", range="sawb")
E3M0 = Quantizer("e3m0", rounding="stochastic")
LUQ = Recipe.of("luq", INT4, INT4, E3M0)
SEED, STEP = 3, 5

CONVS = {
    "plain": {"kernel_size": 3},
    "stride and padding": {"kernel_size": 3, "stride": 2, "padding": 1},
    "uneven": {"kernel_size": (3, 2), "stride": (1, 2), "padding": (2, 0), "dilation": (1, 2)},
    "dilation and groups": {"kernel_size": 3, "dilation": 2, "padding": 2, "groups": 2},
    "depthwise": {"kernel_size": 3, "padding": 1, "groups": 4},
    "pointwise": {"kernel_size": 1},
}
LAYERS = {
    "linear": (lambda: nn.Linear(40, 24, bias=False), (33, 40)),
    "linear, one row": (lambda: nn.Linear(40, 24, bias=False), (40,)),
    "linear, 4-d": (lambda: nn.Linear(12, 9, bias=False), (2, 3, 4, 12)),
    "linear, no rows": (lambda: nn.Linear(12, 9, bias=False), (0, 12)),
    **{
        f"conv, {name}": (lambda options=options: nn.Conv2d(4, 8, bias=False, **options), (3, 4, 9, 10))
        for name, options in CONVS.items()
    },
}
every_layer = pytest.mark.parametrize("name", LAYERS)


def quantized(layer, recipe, seed=SEED):
    layer = luqrun.quantize_model(layer, recipe, skip=(), seed=seed)
    layer.set_step(STEP)
    return layer


def gemm(layer, a, w):
    """The layer's GEMM without bias on any operands."""
    if isinstance(layer, nn.Linear):
        return F.linear(a, w)
    return F.conv2d(a, w, None, layer.stride, layer.padding, layer.dilation, layer.groups)


def gradients(layer, a, w, g):
    """dgrad and wgrad in double by autograd of the plain operation."""
    a, w = (t.detach().double().requires_grad_() for t in (a, w))
    return torch.autograd.grad(gemm(layer, a, w), (a, w), g.double())


def drawn(quantizer, g, sample=0, operand="gradient", micro_step=0, gemm=None):
    """The values (double) that the first layer's draw of this sample gives; gemm: whose own it is."""
    scale, signed, _ = quantizer.measure(g)
    stream = make_stream(SEED, 0, OPERANDS.index(operand), STEP, micro_step)
    stream = stream if gemm is None else of_gemm(stream, gemm)
    return quantizer.encode(g, scale, signed, stream, sample).double() * scale.double()


def values(quantizer, x):
    """The values (double) of a quantizer that does not draw."""
    return quantizer.quantize(x).dequantize(torch.float64)


def close(actual, expected, tolerance=2e-6):
    """Equal to float32 rounding, on the scale of the largest element."""
    assert actual.shape == expected.shape
    if expected.numel():
        assert (actual.double() - expected).abs().max() <= tolerance * expected.abs().max()


@every_layer
@pytest.mark.parametrize("kind", ["signed", "unsigned"])
def test_int4_fprop_is_the_integer_gemm_bit_for_bit(name, kind):
    make, shape = LAYERS[name]
    layer, x = make(), torch.randn(shape)
    x = x.abs() if kind == "unsigned" else x
    a, w = INT4.quantize(x), INT4.quantize(layer.weight)
    product = gemm(layer, a.codes.long(), w.codes.long())
    assert product.dtype == torch.int64
    expected = product.float() * (a.scale * w.scale)
    layer = quantized(layer, LUQ)
    assert torch.equal(layer(x), expected)
    if x.dim() == 4 and "conv" in name:
        output = layer(x.to(memory_format=torch.channels_last))
        assert torch.equal(output, expected)


@every_layer
def test_dgrad_and_wgrad_are_the_gemms_of_dequantized_operands(name):
    make, shape = LAYERS[name]
    x = torch.randn(shape, requires_grad=True)
    layer = quantized(make(), LUQ)
    output = layer(x)
    g = torch.randn_like(output) * 1e-3
    output.backward(g)
    expected = gradients(layer, values(INT4, x), values(INT4, layer.weight), drawn(E3M0, g))
    close(x.grad, expected[0])
    close(layer.weight.grad, expected[1])


@pytest.mark.parametrize("missing", [("weight",), ("activation",), ("gradient",), ("weight", "activation"), OPERANDS])
@pytest.mark.parametrize("name", ["linear", "conv, stride and padding"])
def test_an_operand_without_quantizer_is_in_high_precision(name, missing):
    make, shape = LAYERS[name]
    plain, x = make(), torch.randn(shape, requires_grad=True)
    recipe = Recipe.of("mixed", **{operand: getattr(LUQ, operand) for operand in OPERANDS if operand not in missing})
    layer = copy.deepcopy(plain)
    if recipe.quantizes:
        layer = quantized(layer, recipe)
    else:
        layer = type(quantized(copy.deepcopy(plain), LUQ)).from_module(layer, recipe, SEED, 0)
    output = layer(x)
    g = torch.randn_like(output)
    output.backward(g)
    a = x if recipe.activation is None else values(INT4, x)
    w = plain.weight if recipe.weight is None else values(INT4, plain.weight)
    close(output, gemm(plain, a.double(), w.double()))
    if recipe.weight is None and recipe.activation is None:
        assert torch.equal(output, plain(x))
    expected = gradients(plain, a, w, g if recipe.gradient is None else drawn(E3M0, g))
    close(x.grad, expected[0])
    close(layer.weight.grad, expected[1])


@pytest.mark.parametrize("name", ["linear", "conv, depthwise"])
@pytest.mark.parametrize("scope", ["wgrad", "both"])
def test_samples_average_weight_gradients(name, scope):
    samples = 3
    quantizer = Quantizer("e3m0", rounding="stochastic", samples=samples)
    make, shape = LAYERS[name]
    x = torch.randn(shape, requires_grad=True)
    layer = quantized(make(), Recipe.of("smp", INT4, INT4, quantizer, samples_scope=scope))
    output = layer(x)
    g = torch.randn_like(output)
    output.backward(g)
    singles = [
        gradients(layer, values(INT4, x), values(INT4, layer.weight), drawn(E3M0, g, sample))
        for sample in range(samples)
    ]
    assert not torch.equal(singles[0][1], singles[1][1])
    close(layer.weight.grad, sum(wgrad for _, wgrad in singles) / samples)
    close(x.grad, singles[0][0] if scope == "wgrad" else sum(dgrad for dgrad, _ in singles) / samples)


def test_samples_of_a_positive_gradient_are_averaged_exactly_in_bf16():
    # Unsigned int4 codes go to 15, so 32 draws sum to 480: beyond the integers that bf16 holds.
    quantizer = Quantizer("int4", rounding="stochastic", samples=32)
    layer = quantized(nn.Linear(1, 256, bias=False), Recipe.of("positive", gradient=quantizer))
    g = torch.rand(2, 256) * 3 + 8
    g[0, 0] = 15.0  # a scale of 1
    g = g.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(torch.tensor([[1.0], [-1.0]]))
    output.backward(g)
    singles = [drawn(quantizer, g, sample) for sample in range(32)]
    expected = sum(single[0] - single[1] for single in singles) / 32
    assert torch.equal(layer.weight.grad.double().squeeze(), expected)


def repeated(recipe, times, g, x):
    """(times, ...) dgrads and wgrads of the same gradient, in double."""
    layer = quantized(nn.Linear(x.shape[1], g.shape[1], bias=False), recipe)
    grads = []
    for _ in range(times):
        grads.append(torch.autograd.grad(layer(x), (x, layer.weight), g))
    return layer, *(torch.stack(each).double() for each in zip(*grads, strict=True))


def test_the_expectation_of_luq_gradients_is_the_gemm_of_the_gradient(z_limit):
    # 500 draws of each entry; the family of all entries has a false-alarm rate of 10^-4 (plus what a sum of 6 draws
    # lacks to a normal one: averaged 500 times, nothing to speak of).
    times = 500
    x = torch.randn(6, 5, requires_grad=True)
    g = torch.randn(6, 4) * torch.rand(6, 4) ** 3
    layer, *grads = repeated(LUQ, times, g, x)
    expected = gradients(layer, values(INT4, x), values(INT4, layer.weight), g)
    for found, exact in zip(grads, expected, strict=True):
        error = (found.mean(0) - exact).abs()
        deviation = found.std(0) / times**0.5
        noisy = deviation > 1e-6
        assert noisy.any()
        assert (error[noisy] / deviation[noisy]).max() < z_limit(x.numel() + layer.weight.numel())
        assert (error[~noisy] < 1e-5).all()


def test_n_samples_divide_the_variance_by_n():
    # 400 draws of 32 entries: the ratio of two total variances has a standard error below 0.05; 0.25 is 5 of them.
    x, g = torch.randn(16, 4, requires_grad=True), torch.randn(16, 8)
    totals = {}
    for samples in (1, 4):
        quantizer = Quantizer("e3m0", rounding="stochastic", samples=samples)
        torch.manual_seed(1)
        _, dgrads, wgrads = repeated(Recipe.of("smp", INT4, INT4, quantizer), 400, g, x)
        totals[samples] = wgrads.var(0).sum(), dgrads.var(0).sum()
    assert abs(totals[1][0] / totals[4][0] / 4 - 1) < 0.25
    assert abs(totals[1][1] / totals[4][1] - 1) < 0.25  # scope wgrad: dgrad keeps its one sample


@pytest.mark.parametrize("name", ["linear", "conv, stride and padding"])
def test_bf16_autocast_runs_on_the_same_codes(name):
    make, shape = LAYERS[name]
    x, layer = torch.randn(shape, requires_grad=True), make()
    twin = copy.deepcopy(layer)
    twin_x = x.detach().clone().requires_grad_()
    layer, twin = quantized(layer, LUQ), quantized(twin, LUQ)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x)
    assert output.dtype == torch.bfloat16
    expected = twin(twin_x)
    assert expected.dtype == torch.float32
    close(output, expected.double(), 2**-7)
    g = torch.randn(output.shape).bfloat16()
    output.backward(g)
    expected.backward(g.float())
    assert x.grad.dtype == layer.weight.grad.dtype == torch.float32
    close(x.grad, twin_x.grad.double(), 2**-7)
    close(layer.weight.grad, twin.weight.grad.double(), 2**-7)


@pytest.mark.parametrize("name", ["linear", "conv, plain"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_layers_of_other_dtypes(name, dtype):
    make, shape = LAYERS[name]
    layer, x = make().to(dtype), torch.randn(shape, dtype=dtype).requires_grad_()
    layer = quantized(layer, LUQ)
    output = layer(x)
    g = torch.randn_like(output)
    output.backward(g)
    assert output.dtype == x.grad.dtype == layer.weight.grad.dtype == dtype
    a, w = values(INT4, x), values(INT4, layer.weight)
    tolerance = 2e-6 if dtype == torch.float64 else 2**-7
    close(output, gemm(layer, a, w), tolerance)
    for found, exact in zip((x.grad, layer.weight.grad), gradients(layer, a, w, drawn(E3M0, g)), strict=True):
        close(found, exact, tolerance)


def test_fp16_gradients_below_its_range_of_sums_do_not_overflow():
    # Codes of 64 x 7 over 4096 rows sum to far more than fp16's 65504; the result itself is small.
    layer = quantized(nn.Linear(2, 2, bias=False).half(), LUQ)
    output = layer(torch.ones(4096, 2, dtype=torch.float16))
    output.backward(torch.full_like(output, 1e-3))
    close(layer.weight.grad, torch.full((2, 2), 4.096), 2e-3)


@pytest.mark.parametrize("name", ["linear", "conv, plain"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_and_inf_reach_the_output_and_the_gradients(name, bad):
    make, shape = LAYERS[name]
    x = torch.randn(shape)
    x.view(-1)[3] = bad
    layer = quantized(make(), LUQ)
    assert layer(x).isnan().all()
    x = torch.randn(shape, requires_grad=True)
    output = layer(x)
    g = torch.randn_like(output)
    g.view(-1)[-1] = bad
    output.backward(g)
    assert x.grad.isnan().all()
    assert layer.weight.grad.isnan().all()


def negated(x):
    """x, in memory that holds -x: as the imaginary part of a conjugate is."""
    return torch._neg_view(x.neg())


@pytest.mark.parametrize("lazily", [negated, lambda x: torch._efficientzerotensor(x.shape)], ids=["negated", "zeros"])
@pytest.mark.parametrize("layer", [nn.Linear(9, 24), nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.ReLU()], ids=str)
def test_tensors_whose_memory_holds_something_else(layer, lazily):
    model = luqrun.quantize_model(nn.Sequential(layer, nn.Conv2d(16, 16, 1)), LUQ, skip=())
    x = torch.randn(20, 16, 9, 9).to(memory_format=torch.channels_last)

    def passes(of_x, of_gradient):
        module, given = copy.deepcopy(model[0]), of_x(x).requires_grad_()
        output = module(given)
        return output, *torch.autograd.grad(output, [given, *module.parameters()], of_gradient(output.detach()))

    def plainly(x):
        return lazily(x).clone(memory_format=torch.preserve_format)

    expected = passes(plainly, plainly)
    for given in (lazily, plainly), (plainly, lazily):
        assert all(map(torch.equal, passes(*given), expected))


def test_zero_gradients_stay_zero():
    layer, x = quantized(nn.Linear(6, 4), LUQ), torch.randn(5, 6, requires_grad=True)
    layer(x).backward(torch.zeros(5, 4))
    assert not x.grad.any()
    assert not layer.weight.grad.any()


@pytest.mark.parametrize("name", ["linear", "conv, plain"])
def test_only_the_gradients_asked_for(name):
    make, shape = LAYERS[name]
    x, layer = torch.randn(shape), quantized(make(), LUQ)
    layer(x).sum().backward()
    wgrad, layer.weight.grad = layer.weight.grad, None
    layer.weight.requires_grad_(False)
    layer.set_step(STEP)
    x.requires_grad_()
    layer(x).sum().backward()
    assert layer.weight.grad is None
    dgrad, x.grad = x.grad, None
    layer.weight.requires_grad_(True)
    layer.set_step(STEP)
    layer(x).sum().backward()
    close(x.grad, dgrad.double())
    close(layer.weight.grad, wgrad.double())


def test_exponent_counts():
    x = torch.tensor([1.0, 1.5, -2.0, 0.0, 2.0**-130, 2.0**127])
    counts = exponent_counts(x)
    assert counts.shape == (256,)
    assert {index: count for index, count in enumerate(counts.tolist()) if count} == {127: 2, 128: 1, 0: 2, 254: 1}
