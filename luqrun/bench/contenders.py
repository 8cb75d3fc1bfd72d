"""What is compared: kernels, layers and whole training steps, as callables that do one unit of work."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from unittest import mock

import torch
from torch import Tensor, nn

from luqrun.bench.format_errors import MXFP4, NVFP4, STOCHASTIC
from luqrun.bench.formulas import formula_model, luq, sawb_int4
from luqrun.bench.timing import Contender
from luqrun.bench.workloads import TextWorkload, Workload
from luqrun.config import ScheduleConfig
from luqrun.quant import function, gemms, kernels, operands, quantizer
from luqrun.quant.convert import quantize_model
from luqrun.quant.encoding import Encoding
from luqrun.quant.formats import get_format
from luqrun.quant.function import code_dtype
from luqrun.quant.grids import Lines, grid_of
from luqrun.quant.kernels import ops, reference
from luqrun.quant.kernels.philox import make_stream
from luqrun.quant.quantizer import Quantizer
from luqrun.recipes import recipe
from luqrun.train.schedules import build_optimizer

E3M0 = Quantizer("e3m0", "absmax", "stochastic")
E3M0_HINDSIGHT = Quantizer("e3m0", "hindsight", "stochastic")
INT4 = Quantizer("int4", "sawb", "nearest")
BLOCKS = {
    "mxfp4": MXFP4,
    "mxfp4 stochastic": {**MXFP4, **STOCHASTIC},
    "nvfp4": NVFP4,
    "nvfp4 stochastic": {**NVFP4, **STOCHASTIC},
    "nvfp4 four over six": {**NVFP4, "four_over_six": "mse"},
    "nvfp4 eden": {**NVFP4, "eden": True},
}
SGD = ScheduleConfig(lr=1e-3, momentum=0.9, nesterov=True, weight_decay=5e-4)


@contextmanager
def oracle(device_type: str) -> Iterator[None]:
    """Within, the reference serves this device in place of its kernels, as with LUQRUN_KERNELS=reference."""
    with ExitStack() as stack:
        stack.enter_context(kernels.serving(device_type, reference))
        stack.enter_context(mock.patch.dict(gemms._int8_devices, {device_type: False}))
        yield


def _encode(x, scale, signed, encoding, *rest):
    return reference.encode(x, scale, signed, Encoding.of(encoding), *rest)


def _unpack(fields, shape, channels_last, signed, format, dtype):
    return reference.unpack(fields, shape, channels_last, signed, get_format(format), dtype)


_SEEN_THROUGH = SimpleNamespace(
    statistics=reference.statistics,
    encode=_encode,
    unpack=_unpack,
    relu_=reference.relu_,
    relu_backward=reference.relu_backward,
)


@contextmanager
def transparent(device_type: str) -> Iterator[None]:
    """Within, quantized layers are torch operations that a compiler sees through and may fuse with their neighbours.

    The operators of luqrun.quant.kernels.ops are opaque to it, whatever backend computes them.
    """
    with ExitStack() as stack:
        stack.enter_context(oracle(device_type))
        for module in (quantizer, function, operands):
            stack.enter_context(mock.patch.object(module, "ops", _SEEN_THROUGH))
        yield


def floating_point(device_type: str):
    """Within, GEMMs on codes run in floating point also where int8 units would be taken."""
    return mock.patch.dict(gemms._int8_devices, {device_type: False})


def _as_it_is(device_type: str):
    return nullcontext()


def encoders(x: Tensor) -> tuple[list[Contender], dict[str, int]]:
    """Contenders that quantize x (1-d, float32 or bf16), beside copies of it, and the bytes that they move at least.

    Codes are written as the GEMMs take them. `int4 packed` writes the packed codes that a layer keeps, too.
    """
    device, dtype = x.device, code_dtype(x, True, x.dtype)
    stream, target = make_stream(1).to(device), torch.empty_like(x)
    hindsight = x.abs().max().float()

    def run(quantize: Quantizer, packed: bool = False) -> Callable:
        estimate = hindsight if quantize.range == "hindsight" else None
        return lambda: quantize.run(x, stream, estimate, dtype, packed)

    def by_oracle(quantize: Quantizer) -> Callable:
        def call():
            with oracle(device.type):
                quantize.run(x, stream, None, dtype)

        return call

    contenders = [
        Contender("clone", lambda: x.clone()),
        Contender("copy", lambda: target.copy_(x)),
        Contender("e3m0", run(E3M0)),
        Contender("e3m0 hindsight", run(E3M0_HINDSIGHT)),
        Contender("int4", run(INT4)),
        Contender("int4 packed", run(INT4, packed=True)),
        Contender("e3m0 formulas", lambda: luq(x), every=3),
        Contender("int4 formulas", lambda: sawb_int4(x), every=3),
        Contender("e3m0 reference", by_oracle(E3M0), every=10),
        Contender("int4 reference", by_oracle(INT4), every=10),
    ]
    read, written = x.numel() * x.element_size(), x.numel() * dtype.itemsize
    moved = {
        "copy": 2 * read,
        "e3m0": 2 * read + written,
        "e3m0 hindsight": read + written,
        "int4": 2 * read + written,
        "int4 packed": 2 * read + written + x.numel() // 2,
    }
    return contenders, moved


def block_encoders(x: Tensor) -> list[Contender]:
    """Contenders that quantize x (2-d, float32) in blocks along its last axis, and keep the codes; beside a clone."""
    stream = make_stream(1).to(x.device)
    lines = Lines.along(x.shape, 1)

    def run(quantize: Quantizer) -> Callable:
        grid = grid_of(quantize.encoding, lines)
        return lambda: quantize.run_blocks(x, stream, grid, x.dtype, packed=True)

    found = [Contender(name, run(Quantizer(**keys))) for name, keys in BLOCKS.items()]
    found += [
        Contender(f"hadamard {size}", lambda size=size: ops.hadamard(x, lines.grid, lines.axis, size, None))
        for size in (16, 128)
    ]
    return [Contender("clone", lambda: x.clone()), *found]


def layer_passes(layer: nn.Module, x: Tensor) -> list[Contender]:
    """Forward and backward passes of a float32 layer on x, in each precision; bf16 ones have x and gradient in bf16."""
    device_type, recipes = x.device.type, recipe("luq", skip=())
    variants = {
        "fp32": (layer, False),
        "bf16": (layer, True),
        "luq fp32": (quantize_model(copy.deepcopy(layer), recipes), False),
        "luq bf16": (quantize_model(copy.deepcopy(layer), recipes), True),
        "formulas fp32": (formula_model(copy.deepcopy(layer), recipes), False),
    }

    def make(module: nn.Module, half: bool) -> Callable:
        a = x.detach().to(torch.bfloat16 if half else torch.float32).requires_grad_()
        with torch.no_grad(), torch.autocast(device_type, torch.bfloat16, enabled=half):
            g = torch.randn_like(module(a))

        def run():
            a.grad = None
            module.zero_grad()
            with torch.autocast(device_type, torch.bfloat16, enabled=half):
                output = module(a)
            output.backward(g)

        return run

    slow = {"formulas fp32": 3}
    return [Contender(name, make(*each), slow.get(name, 1)) for name, each in variants.items()]


class Training:
    """A network with its optimizer and one batch; calling it does a training step.

    scheme: plain (unquantized), formulas, or a recipe; half: bf16 autocast; within: entered around each step.
    """

    def __init__(
        self,
        workload: Workload | TextWorkload,
        device: torch.device,
        scheme: str,
        half: bool,
        compiled: bool = False,
        within: Callable = _as_it_is,
    ):
        torch.manual_seed(0)
        self.device, self.half, self.within = device, half, within
        self.workload, model = workload, workload.network()
        if scheme == "formulas":
            model = formula_model(model, recipe("luq"))
        elif scheme != "plain":
            model = quantize_model(model, recipe(scheme), example=workload.example())
        self.model = model.to(device, memory_format=torch.channels_last)
        self.network = torch.compile(self.model) if compiled else self.model
        self.optimizer = build_optimizer(self.model, SGD)
        self.inputs = workload.inputs(device)

    def loss(self) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            outputs = self.workload.outputs(self.network, *self.inputs)
        return self.workload.loss(outputs, *self.inputs)

    def __call__(self) -> None:
        with self.within(self.device.type):
            self.optimizer.zero_grad(set_to_none=True)
            self.loss().backward()
            self.optimizer.step()

    def state_bytes(self) -> int:
        """Bytes that live from step to step: parameters, buffers, the optimizer's state and the batch."""
        tensors = [*self.model.parameters(), *self.model.buffers(), *self.inputs]
        tensors += [each for state in self.optimizer.state.values() for each in state.values() if torch.is_tensor(each)]
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def steps(device: torch.device) -> dict[str, tuple[dict, int]]:
    """The contenders of a training step: by name, the options of Training, and every how many rounds it is timed."""
    on_gpu, found = device.type == "cuda", {}
    for prefix, scheme, precision in (
        (prefix, scheme, precision)
        for prefix, scheme in (("", "plain"), ("luq ", "luq"))
        for precision in ("fp32", "bf16")
    ):
        name, options = f"{prefix}{precision}", {"scheme": scheme, "half": precision == "bf16"}
        if not on_gpu or precision == "bf16":
            found[name] = (options, 1)
        found[f"{name} compiled"] = ({**options, "compiled": True}, 1)
        if scheme == "luq" and gemms.use_int8(device.type):
            found[f"{name}, float GEMMs"] = ({**options, "within": floating_point}, 1)
    formulas = {"scheme": "formulas", "half": True}
    if on_gpu:
        compiled = {"scheme": "luq", "half": True, "compiled": True}
        found["luq bf16 compiled, fused"] = ({**compiled, "within": transparent}, 1)
        found["formulas bf16 compiled"] = ({**formulas, "compiled": True}, 3)
    else:
        found["formulas fp32"] = ({**formulas, "half": False}, 3)
    return {**found, "formulas bf16": (formulas, 3)}
