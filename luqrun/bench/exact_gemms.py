"""Whether the GEMMs of codes are exact under torch's settings: a GPU's libraries choose algorithms that need not be.

Products of codes and sums below 2^24 are exact in fp32, TF32 and bf16, in any order. What is not: Winograd's and
Fourier's convolutions, which transform their operands first and round on the way, and sums of bf16 parts (cuBLAS's
split sums, with torch's allow_bf16_reduced_precision_reduction). torch can ask cuDNN for deterministic algorithms, not
for exact ones: Winograd's repeat themselves bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from luqrun.bench.contenders import E3M0, INT4
from luqrun.bench.gemm import EXACT_SUM, operands
from luqrun.bench.gpu_check import Row, first_line
from luqrun.bench.timing import seconds
from luqrun.internals.of_torch import int_mm
from luqrun.quant.gemms import ConvOp

GEMMS = "fprop", "dgrad", "wgrad"
CALLS = 3  # timed


@dataclass(frozen=True)
class Setting:
    """What torch may do. dtype: of the operands. tf32: of fp32 operands. reduced: sums of bf16 parts.
    used: by luqrun's trainer."""

    dtype: torch.dtype
    tf32: bool = False
    reduced: bool = True
    benchmark: bool = False
    deterministic: bool = False
    cudnn: bool = True
    used: bool = False

    @property
    def name(self) -> str:
        parts = [{torch.float32: "fp32", torch.bfloat16: "bf16", torch.int8: "int8"}[self.dtype]]
        parts += ["TF32"] * self.tf32 + ["no sums of bf16 parts"] * (not self.reduced)
        parts += ["benchmark"] * self.benchmark + ["deterministic"] * self.deterministic
        return ", ".join([*parts, *["without cuDNN"] * (not self.cudnn)])

    @contextmanager
    def within(self) -> Iterator[None]:
        """torch's settings are these."""
        cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
        wanted = [
            (cudnn, "allow_tf32", self.tf32),
            (matmul, "allow_tf32", self.tf32),
            (matmul, "allow_bf16_reduced_precision_reduction", self.reduced),
            (cudnn, "benchmark", self.benchmark),
            (cudnn, "deterministic", self.deterministic),
            (cudnn, "enabled", self.cudnn),
        ]
        with ExitStack() as stack:
            for module, name, value in wanted:
                stack.callback(setattr, module, name, getattr(module, name))
                setattr(module, name, value)
            yield


LINEAR_SETTINGS = (
    Setting(torch.float32, used=True),
    Setting(torch.bfloat16, used=True),
    Setting(torch.bfloat16, reduced=False),
    Setting(torch.float32, tf32=True),
    Setting(torch.int8),
)
CONV_SETTINGS = (
    Setting(torch.float32, used=True),
    Setting(torch.bfloat16, used=True),
    Setting(torch.float32, deterministic=True),
    Setting(torch.float32, tf32=True),
    Setting(torch.float32, tf32=True, deterministic=True),
    Setting(torch.bfloat16, deterministic=True),
    Setting(torch.float32, cudnn=False),
)
# For a process of their own: torch keeps what it chose for a convolution, whether with the benchmark or without.
BENCHMARK_SETTINGS = (
    *(Setting(torch.float32, benchmark=True, deterministic=fixed) for fixed in (False, True)),
    *(Setting(torch.float32, tf32=True, benchmark=True, deterministic=fixed) for fixed in (False, True)),
    *(Setting(torch.bfloat16, benchmark=True, deterministic=fixed) for fixed in (False, True)),
)


@dataclass(frozen=True)
class Conv:
    """A convolution, padded as its kernel asks for: images, channels in and out, pixels a side."""

    images: int
    inputs: int
    outputs: int
    size: int
    kernel: int
    stride: int = 1
    groups: int = 1

    @property
    def name(self) -> str:
        groups = f", {self.groups} groups" if self.groups > 1 else ""
        stride = f", stride {self.stride}" if self.stride > 1 else ""
        return f"{self.kernel}x{self.kernel} {self.inputs}-{self.outputs} on {self.size}x{self.size}{stride}{groups}"


@dataclass(frozen=True)
class Case:
    """A GEMM of codes: run(x, y) for x and y in a setting's type, and what it gives in float64."""

    gemm: str
    name: str
    run: Callable[[Tensor, Tensor], Tensor]
    codes: tuple[Tensor, Tensor]
    expected: Tensor

    @classmethod
    def of(cls, gemm: str, name: str, run: Callable, x: Tensor, y: Tensor) -> Case:
        """Computed in float64 without cuDNN, which is exact in any order."""
        with Setting(torch.float32, cudnn=False).within():
            expected = run(x.double(), y.double())
            largest = run(x.double().abs(), y.double().abs()).max().item()
        assert largest < EXACT_SUM, (name, gemm, largest)  # beyond, fp32 would round
        return cls(gemm, name, run, (x, y), expected)


def linear_cases(shapes: tuple[tuple[int, int, int], ...], device: torch.device) -> Iterator[Case]:
    """Of linear layers: rows, inputs, outputs."""
    for shape in shapes:
        for name, (left, right) in operands(*shape, device).items():
            yield Case.of(name.partition(" ")[0], "x".join(map(str, shape)), _product, left, right)


def _product(left: Tensor, right: Tensor) -> Tensor:
    return int_mm(left, right) if left.dtype == torch.int8 else left @ right


def conv_cases(shapes: tuple[Conv, ...], device: torch.device) -> Iterator[Case]:
    """In contiguous and in channels_last memory."""
    for shape in shapes:
        for layout in (torch.channels_last, torch.contiguous_format):
            yield from _conv_cases(shape, layout, device)


def _conv_cases(shape: Conv, layout: torch.memory_format, device: torch.device) -> Iterator[Case]:
    torch.manual_seed(0)
    op = ConvOp((shape.stride,) * 2, ((shape.kernel - 1) // 2,) * 2, (1, 1), shape.groups)
    x = torch.randn(shape.images, shape.inputs, shape.size, shape.size, device=device)
    y = torch.randn(shape.outputs, shape.inputs // shape.groups, shape.kernel, shape.kernel, device=device)
    a, w = (INT4.quantize(each.to(memory_format=layout)).codes for each in (x.relu(), y))
    z = torch.randn_like(op.fprop(a.float(), w.float()))
    g = E3M0.quantize(z.to(memory_format=layout)).codes
    name = f"{shape.name}{', channels_last' if layout == torch.channels_last else ''}"
    yield Case.of("fprop", name, op.fprop, a, w)
    yield Case.of("dgrad", name, lambda g, w: op.dgrad(g, w, a.shape), g, w)
    yield Case.of("wgrad", name, lambda g, a: op.wgrad(g, a, w.shape), g, a)


@dataclass
class Tally:
    """Of a setting: cases tried and exact, by GEMM; what it was not exact on or refused, and how; the time of a call of
    each case that it took."""

    tried: dict[str, int] = field(default_factory=lambda: dict.fromkeys(GEMMS, 0))
    exact: dict[str, int] = field(default_factory=lambda: dict.fromkeys(GEMMS, 0))
    inexact: list[dict] = field(default_factory=list)
    refused: list[dict] = field(default_factory=list)
    seconds: float = 0.0

    def row(self, what: str, setting: Setting) -> Row:
        counts = ", ".join(f"{gemm} {self.exact[gemm]} of {count}" for gemm, count in self.tried.items() if count)
        found = [f"exact: {counts}; {1e3 * self.seconds:.3g} ms" if counts else "took none"]
        if self.inexact:
            first = self.inexact[0]
            found.append("not: {gemm} {case}, {wrong} of {of} elements, off by {off:g}".format(**first))
            found[-1] += f" ({', '.join(first['kernels'])})" if first["kernels"] else ""
        if self.refused:
            found.append("refused {}: {gemm} {case}, {why}".format(len(self.refused), **self.refused[0]))
        numbers = {"setting": setting.name, **vars(self)}
        if not setting.used:
            return Row(f"{what}: {setting.name}", "; ".join(found), None, numbers)
        right = not self.inexact and not self.refused and any(self.tried.values())
        return Row(f"{what}: {setting.name} (as in training)", "; ".join(found), right, numbers)


def check(cases: list[Case], setting: Setting) -> Tally:
    """Compute the cases under a setting, bit for bit, and time them."""
    tally = Tally()
    for case in cases:
        x, y = (each.to(setting.dtype) for each in case.codes)
        of_case, call = {"gemm": case.gemm, "case": case.name}, lambda: case.run(x, y)  # noqa: B023
        with setting.within():
            try:
                found = call()
                tally.seconds += seconds(call, CALLS, 1, x.device)
            except RuntimeError as error:
                tally.refused.append({**of_case, "why": first_line(error)})
                continue
            rounded = case.expected.float().to(found.dtype) if found.is_floating_point() else case.expected
            wrong = found != rounded  # NaN is
            tally.tried[case.gemm] += 1
            tally.exact[case.gemm] += not wrong.any().item()
            if wrong.any():
                off = (found.double() - case.expected).abs().max().item()
                names = kernels_of(call, x.device) if not tally.inexact else []
                counts = {"wrong": int(wrong.sum()), "of": wrong.numel(), "off": off, "kernels": names}
                tally.inexact.append({**of_case, **counts})
    return tally


def kernels_of(run: Callable[[], object], device: torch.device) -> list[str]:
    """The two kernels that a call spends most time in on a GPU, which tell the library's algorithm."""
    if device.type != "cuda":
        return []
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        run()
        torch.cuda.synchronize(device)
    found = sorted(recorded.key_averages(), key=lambda event: event.device_time_total, reverse=True)
    return [event.key[:80] for event in found[:2]]


def rows(what: str, cases: list[Case], settings: tuple[Setting, ...]) -> Iterator[Row]:
    """A row a setting, and in the end which of them were exact, fastest first."""
    exact = []
    for setting in settings:
        tally = check(cases, setting)
        yield tally.row(what, setting)
        if not tally.inexact and not tally.refused:
            exact.append((tally.seconds, setting.name))
    chosen = "; ".join(f"{name} ({1e3 * taken:.3g} ms)" for taken, name in sorted(exact))
    yield Row(f"{what}: settings that are exact on all, fastest first", chosen or "none")
