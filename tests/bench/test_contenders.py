"""What the benchmark compares: the paper's formulas, the contenders, and how memory is counted."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from luqrun.bench import gemm
from luqrun.bench.contenders import Training, encoders, floating_point, oracle, steps, transparent
from luqrun.bench.formulas import FormulaAttention, FormulaConv2d, FormulaLinear, formula_model, luq, sawb_int4
from luqrun.bench.gemm import checked, operands, units
from luqrun.bench.memory import kept_for_backward, peak, peak_of_allocations, resident_peaks
from luqrun.bench.workloads import Workload
from luqrun.config import ModelConfig
from luqrun.quant import gemms, kernels
from luqrun.quant.convert import quantize_model, quantized_layers
from luqrun.quant.kernels import ops, reference
from luqrun.quant.kernels.philox import make_stream
from luqrun.quant.quantizer import Quantizer
from luqrun.recipes import recipe
from luqrun.tasks.classification.networks import build_model

CPU = torch.device("cpu")
SMALL = Workload("resnet8", channels=1, size=20, batch=2, classes=10)
LUQ = recipe("luq", skip=())


@pytest.mark.parametrize(
    "make", [lambda x: x, torch.Tensor.abs, lambda x: torch.where(x > 0, 1.5, -1.5), torch.zeros_like]
)
def test_the_formula_of_the_forward_gives_the_quantizers_values(make):
    x = make(torch.randn(3, 1000))
    expected = Quantizer("int4", range="sawb").quantize(x).dequantize()
    torch.testing.assert_close(sawb_int4(x), expected)


def test_the_formula_of_the_gradient_stays_on_the_grid_and_between_neighbours():
    x = torch.randn(5000) * torch.logspace(-4, 0, 5000)
    alpha = x.abs().max() / 64
    codes = luq(x) / alpha
    levels = torch.tensor([0.0, 1, 2, 4, 8, 16, 32, 64])
    assert torch.isin(codes.abs(), levels).all()
    assert (codes * x >= 0).all()
    ratio = (x / alpha).abs()
    below = levels[torch.searchsorted(levels, ratio, right=True) - 1]
    above = levels[torch.searchsorted(levels, ratio)]
    assert ((codes.abs() == below) | (codes.abs() == above)).all()
    assert torch.equal(luq(levels - 1 * (levels == 4)), luq(levels - 1 * (levels == 4)).abs())
    assert torch.equal(luq(-levels), -levels)
    assert torch.equal(luq(torch.zeros(4)), torch.zeros(4))


@pytest.mark.parametrize("value", [0.01, 0.7, 1.2, 5.0, 60.0])
def test_the_formula_of_the_gradient_is_unbiased(value, z_limit):
    count = 100_000
    x = torch.full((count,), value)
    x[0] = 64.0
    values = luq(x)[1:].double()
    deviation = values.std() / (count - 1) ** 0.5
    assert abs(values.mean() - value) < z_limit(5) * deviation


def test_formulas_keep_dtype_and_shape():
    x = torch.randn(2, 3, 4, 5, dtype=torch.bfloat16)
    for values in (luq(x), sawb_int4(x)):
        assert (values.dtype, values.shape) == (x.dtype, x.shape)


def test_a_layer_of_the_formulas_runs_its_three_gemms_on_them():
    layer = formula_model(nn.Linear(6, 4), LUQ)
    x, g = torch.randn(5, 6, requires_grad=True), torch.randn(5, 4)
    output = layer(x)
    a, w = sawb_int4(x.detach()), sawb_int4(layer.weight.detach())
    torch.testing.assert_close(output, F.linear(a, w, layer.bias))
    torch.manual_seed(1)
    output.backward(g)
    torch.manual_seed(1)
    quantized = luq(g)
    torch.testing.assert_close(x.grad, quantized @ w)
    torch.testing.assert_close(layer.weight.grad, quantized.t() @ a)
    torch.testing.assert_close(layer.bias.grad, g.sum(0))


@pytest.mark.parametrize(("name", "channels", "size"), [("resnet18", 3, 32), ("vit_tiny", 1, 20)])
def test_the_formulas_take_the_layers_that_luqrun_quantizes(name, channels, size):
    model = build_model(ModelConfig(name), 10, channels, size).eval()
    quantized = {layer for layer, _ in quantized_layers(quantize_model(copy.deepcopy(model), recipe("luq")))}
    expected = {key: value.shape for key, value in model.state_dict().items()}
    model = formula_model(model, recipe("luq"))
    kinds = (FormulaAttention, FormulaConv2d, FormulaLinear)
    assert {layer for layer, module in model.named_modules() if isinstance(module, kinds)} == quantized
    assert {key: value.shape for key, value in model.state_dict().items()} == expected
    model.train()(torch.randn(2, channels, size, size)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_attention_of_the_formulas_computes_attention():
    x = torch.randn(2, 7, 8)
    plain = nn.MultiheadAttention(8, 2, batch_first=True)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.copy_(sawb_int4(parameter))  # what is on the grid already stays
        expected = plain(sawb_int4(x), sawb_int4(x), sawb_int4(x), need_weights=False)[0]
        found = formula_model(copy.deepcopy(plain), LUQ)(x, x, x, need_weights=False)[0]
    assert (found - expected).norm() < 0.2 * expected.norm()  # only the input of the output projection is quantized


def test_the_oracle_serves_within_only():
    x, quantizer = torch.randn(100), Quantizer("e3m0", rounding="stochastic")
    codes = quantizer.run(x, make_stream(1), None, torch.int8).codes
    before = ops.backend_for("cpu"), dict(kernels._fuses), dict(gemms._int8_devices)
    with oracle("cpu"):
        assert ops.backend_for("cpu") is reference
        assert not gemms.use_int8("cpu")
        assert torch.equal(quantizer.run(x, make_stream(1), None, torch.int8).codes, codes)
    assert before == (ops.backend_for("cpu"), kernels._fuses, gemms._int8_devices)
    with floating_point("cpu"):
        assert not gemms.use_int8("cpu")
    assert before[2] == gemms._int8_devices


def test_a_compiler_sees_through_transparent_layers():
    graphs = []

    def backend(graph, inputs):
        parts = [part for part in graph.modules() if isinstance(part, torch.fx.GraphModule)]  # the passes are parts
        graphs.append([str(node.target) for part in parts for node in part.graph.nodes])
        return graph

    def gradients(layer, within, network):
        x = torch.linspace(-1, 1, 40).view(5, 8).requires_grad_()
        for _ in range(2):
            with within("cpu"):
                network(x).square().sum().backward()
        return x.grad, layer.weight.grad

    layers = [quantize_model(nn.Linear(8, 4, bias=False), LUQ) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    expected = gradients(layers[0], oracle, layers[0])
    torch._dynamo.reset()
    found = gradients(layers[1], transparent, torch.compile(layers[1], fullgraph=True, backend=backend))
    torch._dynamo.reset()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    (targets,) = graphs  # compiled once for both steps
    assert targets
    assert {target for target in targets if "luqrun" in target} == {"luqrun.next_draws"}  # never to be repeated


def test_encoders_count_what_they_must_move():
    x = torch.randn(1000)
    taking_part, moved = encoders(x)
    assert moved.keys() <= {contender.name for contender in taking_part}
    written = 1 if gemms.use_int8("cpu") else 4
    assert moved["copy"] == 8000
    assert moved["e3m0"] == moved["int4"] == 8000 + 1000 * written
    assert moved["int4 packed"] - moved["int4"] == 500
    assert moved["e3m0"] - moved["e3m0 hindsight"] == 4000


def test_steps_train():
    for name, (options, _) in steps(CPU).items():
        if options.get("compiled"):  # minutes
            continue
        training = Training(SMALL, CPU, **options)
        before = [parameter.detach().clone() for parameter in training.model.parameters()]
        training()
        assert all(not torch.equal(old, new) for old, new in zip(before, training.model.parameters(), strict=True)), (
            name
        )


def test_peak_counts_what_is_allocated_at_once():
    size, kept = 250_000, []
    assert peak_of_allocations(lambda: kept.extend(torch.empty(size) for _ in range(3))) == pytest.approx(12 * size)
    assert peak_of_allocations(lambda: [torch.empty(size).numel() for _ in range(3)]) == pytest.approx(4 * size)


@pytest.mark.usefixtures("by_operators")
def test_layers_keep_half_a_byte_an_element():
    plain, quantized = (Training(SMALL, CPU, scheme, half=False) for scheme in ("plain", "luq"))
    kept = kept_for_backward(quantized)
    weights = sum(layer.weight.numel() for _, layer in quantized_layers(quantized.model))
    assert kept["elements"] > weights
    assert 0.5 <= kept["layers"] / kept["elements"] < 0.51
    assert kept["layers"] < kept["bytes"] < kept_for_backward(plain)["bytes"]
    assert all(parameter.grad is None for parameter in quantized.model.parameters())


def test_the_peak_holds_the_state_and_what_is_kept():
    training = Training(SMALL, CPU, "plain", half=False)
    training()
    least = training.state_bytes() + kept_for_backward(training)["bytes"]
    found = peak(lambda: Training(SMALL, CPU, "plain", half=False), CPU)
    assert least <= found < 4 * least


def test_resident_peaks_hold_what_was_allocated():
    """Of a process of its own: what numba and oneDNN allocate is in it, too."""
    workload = Workload("resnet8", channels=1, size=20, batch=128, classes=10)
    options = {"scheme": "plain", "half": False}
    allocated = peak(lambda: Training(workload, CPU, **options), CPU)
    found = resident_peaks(workload, options, 1, {})
    assert len(found) in (0, 1)  # none where a process may not forget its peak
    assert all(0.8 * allocated < each < 10 * allocated for each in found)


def test_units_multiply_codes_exactly():
    for name, (left, right) in operands(32, 48, 16, CPU).items():
        contenders, exact, lacking = checked(left, right, "E3M0" in name)
        assert {"fp32", "bf16", "int8"} <= exact.keys()
        assert {contender.name for contender in contenders} == units(
            left, right, "E3M0" in name
        ).keys() - lacking.keys()
        assert all(exact.values()), (name, exact)
        expected = left.long() @ right.long()
        assert torch.equal(left.double() @ right.double(), expected.double())
    assert left.abs().max() == 64


def test_a_unit_that_is_wrong_or_lacking_is_told(monkeypatch):
    def lacking(*operands, **options):
        raise RuntimeError("only from compute capability 8.9 on\nException raised from somewhere")

    monkeypatch.setattr(torch, "_scaled_mm", lacking)
    product = torch._int_mm
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: product(a, b) + 1)
    left, right = operands(32, 48, 16, CPU)["fprop INT4 x INT4"]
    contenders, exact, without = checked(left, right, has_e3m0=False)
    assert without == {"fp8 e4m3 x e4m3": "only from compute capability 8.9 on"}
    assert exact == {"fp32": True, "bf16": True, "int8": False}
    assert "int8" in {contender.name for contender in contenders}


def test_a_unit_that_is_emulated_is_not_timed(monkeypatch):
    monkeypatch.setattr(gemm, "TOO_SLOW", -1.0)
    left, right = operands(80, 48, 16, CPU)["fprop INT4 x INT4"]
    contenders, exact, without = checked(left, right, has_e3m0=False)
    assert not contenders
    assert not exact
    assert "64 of 80 rows took 0.0 s" in without["int8"]
