"""The kernels as operators of torch: what they promise to the dispatcher and the compiler."""

import copy
import importlib
import inspect
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from kernel_inputs import LAST, assert_identical, encoding, normal
from layers import INT4, same
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import luqrun
from luqrun.errors import UserError
from luqrun.quant import gemms, kernels
from luqrun.quant.convert import set_step
from luqrun.quant.encoding import Encoding
from luqrun.quant.formats import FORMATS
from luqrun.quant.grids import Lines, grid_of
from luqrun.quant.kernels import blocks, operators, ops, reference
from luqrun.quant.kernels.cpu import backend as cpu
from luqrun.quant.kernels.cpu import int8, int8_library
from luqrun.quant.kernels.philox import make_stream
from luqrun.quant.quantizer import Quantizer
from luqrun.quant.recipe import Recipe

OPERATORS = torch.ops.luqrun
STATIC = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
STREAM, TRUE, SCALE = make_stream(5), torch.tensor(True), torch.tensor(0.05)
INPUTS = {
    "vector": normal(33),
    "contiguous": normal(2, 3, 4, 5),
    "channels_last": normal(2, 3, 4, 5).to(memory_format=LAST),
    "bfloat16": normal(2, 3, 5, 5).bfloat16().to(memory_format=LAST),
    "half": normal(7).half(),
    "slice": normal(8, 6)[:, ::2],
    "cropped": normal(2, 3, 6, 6).to(memory_format=LAST)[:, :, 1:, :5],
    "transposed": normal(5, 7).t(),
    "pixel": normal(2, 3, 1, 1).to(memory_format=LAST),
    "scalar": normal(1)[0],
    "empty": normal(0),
}


def check(operator, *arguments, also=()):
    torch.library.opcheck(operator.default, arguments, test_utils=(*STATIC, *also))


def check_dynamic(operator, *arguments):
    check(operator, *arguments, also=("test_aot_dispatch_dynamic",))


def test_every_operator_is_checked_here():
    assert {name.split("::")[1] for name in operators.LIBRARY._op_defs} == {
        "next_draws", "statistics", "encode", "quantize", "unpack", "encode_blocks", "decode_blocks", "block_mask",
        "hadamard", "signs", "relu_", "relu_backward", "int8_conv", "int8_conv_dgrad", "int8_conv_wgrad", "int8_linear",
        "int8_linear_wgrad", "forward_only",
    }  # fmt: skip


@pytest.mark.parametrize("name", list(INPUTS))
def test_statistics(name):
    check(OPERATORS.statistics, INPUTS[name], True)
    check(OPERATORS.statistics, INPUTS[name], False, torch.tensor(1.0))


@pytest.mark.parametrize("name", list(INPUTS))
def test_encode_and_quantize(name):
    x = INPUTS[name]
    check(
        OPERATORS.encode,
        x,
        SCALE,
        TRUE,
        Encoding("e3m0", rounding="stochastic", underflow="flush").key,
        STREAM,
        3,
        torch.bfloat16,
        True,
        True,
    )
    check(OPERATORS.encode, x, SCALE, TRUE, Encoding("int4").key, STREAM, 0, torch.float16)
    how = Encoding("e3m0", "hindsight", "stochastic").key, torch.tensor(0.5), STREAM
    check(OPERATORS.quantize, x, *how, torch.float32, True)
    how = Encoding("int8", "sawb", pow2_scale=True).key, None, STREAM
    check(OPERATORS.quantize, x, *how, torch.int16, False)


@pytest.mark.parametrize("advances", [False, True])
@pytest.mark.parametrize("evaluates", [False, True])
def test_next_draws(advances, evaluates):
    check(OPERATORS.next_draws, torch.arange(18).view(3, 6), advances, evaluates, 3, 2)


@pytest.mark.parametrize("form", ["int4", "e4m0"])
@pytest.mark.parametrize("shape", [(33,), (2, 3, 4, 5), (0,), ()])
def test_unpack(form, shape):
    x = normal(*shape)
    fields = cpu.encode(x, SCALE, TRUE, encoding(FORMATS[form], "nearest"), STREAM, packed=True)[1]
    for dtype, last in product(
        (torch.float32, torch.int16, torch.float64), (False, True) if x.dim() == 4 else (False,)
    ):
        check(OPERATORS.unpack, fields, shape, last, TRUE, form, dtype)


BLOCKS = {
    "e8m0": Encoding("e2m1", block=4, rounding="stochastic", headroom=0.75),
    "eden": Encoding("e2m1", block=4, scale_format="e4m3", eden=True),
    "fp32": Encoding("int8", block=4, scale_format="fp32"),
    "powers": Encoding("e3m0", block=4),  # without a kernel of the CPU's
}


@pytest.mark.parametrize("how", BLOCKS.values(), ids=list(BLOCKS))
def test_blocks_and_rotations(how):
    for number, x in enumerate((normal(3, 7), normal(2, 6, 3, 5).to(memory_format=LAST), normal(0, 4).bfloat16())):
        last = x.dim() == 4
        lines = Lines(30, 6, 1) if last else Lines(1, *x.shape)
        grid, block = grid_of(how, lines)
        dtype = torch.bfloat16 if x.dtype == torch.bfloat16 and how.scale_format != "fp32" else torch.float32
        arguments = x, how.key, grid, block, x.float().abs().sum(), STREAM, 3, dtype
        check(OPERATORS.encode_blocks, *arguments, False)
        check(OPERATORS.encode_blocks, *arguments, True)
        _, fields, scales, tensor_scale = ops.encode_blocks(*arguments, True)
        check(OPERATORS.block_mask, x, scales, tensor_scale, how.key, grid, block)
        check(OPERATORS.decode_blocks, fields, scales, x.shape, last, how.key, grid, block, dtype)
        check(OPERATORS.hadamard, x, grid, lines.axis, 2 ** (number + 1), (None, torch.ones(4), None)[number])


@pytest.mark.parametrize("size", [2, 16, 256])
def test_signs(size):
    check(OPERATORS.signs, STREAM, size)
    assert torch.equal(ops.signs(STREAM, size), blocks.signs(STREAM, size))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_relu(dtype):
    for x in (normal(33), normal(2, 3, 4, 5), normal(2, 3, 4, 5).to(memory_format=LAST), normal(0), normal(1)[0]):
        check(OPERATORS.relu_, x.to(dtype))
        check(OPERATORS.relu_, x.to(dtype), 6.0)
        mask = cpu.relu_(x.to(dtype))
        for last in (False, True) if x.dim() == 4 else (False,):
            check(OPERATORS.relu_backward, x.to(dtype), mask, last)
    check(OPERATORS.relu_backward, normal(4, 1).to(dtype).expand(4, 8), mask.new_zeros(4), False)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("direct", [False, True], ids=["patches", "direct"])
def test_int8_conv(channels_last, direct, monkeypatch):
    monkeypatch.setattr(int8_library, "prefers_direct", lambda patches, channels: direct)
    g = torch.Generator().manual_seed(0)
    a = torch.randint(-7, 8, (2, 3, 7, 8), dtype=torch.int8, generator=g)
    for kernel, stride, padding, dilation in (
        ((3, 3), (1, 1), (1, 1), (1, 1)),
        ((3, 2), (2, 1), (0, 2), (1, 2)),
        ((1, 1), (1, 1), (0, 0), (1, 1)),
    ):
        w = torch.randint(-7, 8, (4, 3, *kernel), dtype=torch.int8, generator=g)
        how = stride, padding, dilation
        for each, dtype in product((a, a.to(memory_format=LAST)), (torch.float32, torch.bfloat16)):
            check(OPERATORS.int8_conv, each, w, SCALE, *how, dtype, channels_last, TRUE)
            out = int8.conv(each, w, SCALE, *how, dtype, channels_last, TRUE)
            check(OPERATORS.int8_conv_wgrad, [out.char(), out.char()], each, kernel, *how)
            check(OPERATORS.int8_conv_dgrad, out.char(), w, SCALE, a.shape, *how, dtype, channels_last, TRUE)


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 2, 5), (0, 5), (3, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_linear(shape, dtype):
    g = torch.Generator().manual_seed(0)
    a, w = (torch.randint(-7, 8, size, dtype=torch.int8, generator=g) for size in (shape, (4, shape[-1])))
    check(OPERATORS.int8_linear, a, w, SCALE, dtype, TRUE, False)
    out = int8.linear(a, w, SCALE, dtype, TRUE, False)
    check(OPERATORS.int8_linear, out.char(), w, SCALE, dtype, TRUE, True)
    check(OPERATORS.int8_linear_wgrad, [out.char(), out.char()], a)


def test_forward_only():
    x = normal(3, 4).requires_grad_()
    check(OPERATORS.forward_only, *[x.detach()] * 3)
    with pytest.raises(UserError, match="no gradient"):
        OPERATORS.forward_only(x.detach(), x, x).sum().backward()


class Recorder(TorchDispatchMode):
    """The names of this package's operators, as tools see them that watch the dispatcher."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        if operator.namespace == "luqrun":
            self.names.add(operator._schema.name.split("::")[1])
        return operator(*arguments, **(options or {}))


@pytest.mark.usefixtures("by_operators")
def test_tools_that_watch_the_dispatcher_see_operators():
    def trained():
        model = luqrun.quantize_model(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), RECIPES["luq"], skip=())
        output = model(torch.ones(2, 3, 5, 5))
        output.sum().backward()
        return output

    with Recorder() as recorder:
        trained()
    # Not met, the next lines would be a crash: a tensor without data has no address.
    assert {"next_draws", "quantize", "unpack"} <= recorder.names
    with FakeTensorMode():
        output = trained()
        model = luqrun.quantize_model(nn.Conv2d(3, 4, 3), RECIPES["luq"], skip=())
        set_step(model, 4)  # whose streams have no numbers either
        assert model(torch.ones(2, 3, 5, 5)).shape == (2, 4, 3, 3)
    assert output.shape == (2, 4, 3, 3)


# Compiled


class Net(nn.Module):
    """A convolution with its ReLU, attention and linear layers."""

    def __init__(self):
        super().__init__()
        self.conv, self.relu = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True)
        self.down = nn.Conv2d(8, 8, 2, stride=2)
        self.attention, self.fc = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 5)

    def forward(self, x):
        x = self.down(self.relu(self.conv(x)))
        rows = x.flatten(2).transpose(1, 2)
        return self.fc(rows + self.attention(rows, rows, rows, need_weights=False)[0]).mean(1)


E3M0 = {"format": "e3m0", "rounding": "stochastic"}
RECIPES = {
    "luq": Recipe.of("luq", INT4, INT4, Quantizer(**E3M0)),
    "luq_smp2": Recipe.of("luq_smp2", INT4, INT4, Quantizer(**E3M0, samples=2)),
    "luq_hindsight": Recipe.of("luq_hindsight", INT4, INT4, Quantizer(**E3M0, range="hindsight")),
}


def assert_same_steps(model, twin, network, bf16, steps=3):
    """Outputs, gradients and buffers of `model`, and of `twin` run as `network`, over some steps."""
    for step in range(steps):
        x, found = torch.randn(4, 3, 8, 8).to(memory_format=LAST), []
        for module, run in ((model, model), (twin, network)):
            set_step(module, step)
            module.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                output = run(x)
            F.cross_entropy(output.float(), torch.arange(4)).backward()
            found.append([output.detach(), *(parameter.grad for parameter in module.parameters())])
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter -= 0.1 * parameter.grad
        assert same(*found), step
        assert same(model.buffers(), twin.buffers()), step
        assert same(
            *([layer.streams for layer in each.modules() if hasattr(layer, "streams")] for each in (model, twin))
        )


def test_a_model_that_was_quantized_elsewhere_compiles_whole(monkeypatch):
    # As a run's, which moves to the GPU afterwards: the compiler must find the kernels of the new device loaded.
    torch._dynamo.reset()
    monkeypatch.setattr(kernels, "_fuses", {})
    monkeypatch.setattr(gemms, "_int8_devices", {})
    model = luqrun.quantize_model(nn.Linear(8, 4, device="meta"), RECIPES["luq"], skip=())
    assert "cpu" not in kernels._fuses
    model.to_empty(device="cpu")
    with torch.no_grad():
        model.weight.fill_(0.5), model.bias.zero_()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(torch.ones(3, 8)), torch.full((3, 4), 4.0))


@pytest.mark.parametrize(("name", "bf16"), [("luq", False), ("luq_smp2", True), ("luq_hindsight", False)])
def test_a_compiled_model_trains_as_an_eager_one(name, bf16):
    torch._dynamo.reset()
    model = luqrun.quantize_model(Net(), RECIPES[name], skip=()).to(memory_format=LAST)
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    assert_same_steps(model, twin, compiled, bf16)
    x = torch.randn(4, 3, 8, 8).to(memory_format=LAST)
    model.eval(), twin.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        assert_identical(compiled(x), model(x))
    model.train(), twin.train()
    assert_same_steps(model, twin, compiled, bf16, steps=1)
    if name == "luq_hindsight":
        assert all(buffer > 0 for buffer in twin.buffers())


@pytest.mark.parametrize("name", [name for name in kernels.MODULES if name != "reference"])
def test_every_backend_takes_the_same_arguments(name):
    pytest.importorskip("triton") if name == "cuda" else None
    backend, others = importlib.import_module(kernels.MODULES[name]), (reference, cpu)
    for other in others:
        for function, signature in signatures(other).items():
            found = signatures(backend).get(function)
            assert found is None or found == signature, function


def signatures(backend):
    """By name, what the public functions that operators call take."""
    names = {name.split("::")[1] for name in operators.LIBRARY._op_defs} | {"batch_norm", "batch_norm_backward"}
    found = {name: getattr(backend, name, None) for name in names}
    return {name: tuple(inspect.signature(each).parameters) for name, each in found.items() if each is not None}


def test_operators_are_called_past_the_dispatcher_only_where_nobody_watches():
    x, seen = normal(8), []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    def watched(*tensors):
        seen.clear()
        with operators.directly(*tensors):
            ops.statistics(x, False)
        return torch.ops.luqrun.statistics.default in seen

    assert not watched(x)
    with Watching():
        assert watched(x)
    assert operators._thread.direct is False
    with operators.directly(x):
        assert operators._thread.direct is True
        with operators.directly(torch.empty(2, device="meta")):
            assert operators._thread.direct is False
        assert operators._thread.direct is True
    with pytest.raises(ZeroDivisionError), operators.directly(x):
        raise ZeroDivisionError
    assert operators._thread.direct is False
