"""The lines of scripts/gpu_check.py, what matters most first."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from luqrun.bench import exact_gemms, same_bits, sections
from luqrun.bench.contenders import Training, steps
from luqrun.bench.exact_gemms import (
    BENCHMARK_SETTINGS,
    CONV_SETTINGS,
    LINEAR_SETTINGS,
    Conv,
    Setting,
    conv_cases,
    linear_cases,
)
from luqrun.bench.gpu_check import STOPPED, Line, Row
from luqrun.bench.memory import peak
from luqrun.bench.report import REQUIREMENTS
from luqrun.bench.run import describe
from luqrun.bench.timing import Contender, interleave

ROOT = Path(__file__).resolve().parents[2]
# The benchmark's sections, which one of them runs on small sizes, are lines here.
GPU_TESTS = ("-m", "gpu", "--deselect", "tests/quant/test_gpu.py::test_the_benchmark_runs")
TRITON_TESTS = ("tests/quant/test_kernels_cuda.py", "tests/quant/test_kernels_cuda_blocks.py")
OUTCOME = re.compile(r"^(\S+::.+?) (PASSED|FAILED|SKIPPED|ERROR|XFAIL|XPASS)\b", re.M)
REASON = re.compile(r"^(?:FAILED|ERROR) (.+)$", re.M)
ENDING = 5.0  # seconds before the end of a line at which its tests are stopped


@dataclass(frozen=True)
class Sizes:
    """How much is checked. benchmark: elements, batches and rounds. elements, seeds: of tensors whose bits are
    compared; many: elements of large ones. linears: rows, inputs, outputs. steps: the contenders of a step, each
    against the first."""

    benchmark: sections.Sizes
    elements: int
    seeds: int
    many: int
    linears: tuple[tuple[int, int, int], ...]
    convs: tuple[Conv, ...]
    models: tuple[str, ...]
    steps: tuple[str, ...]


FULL = Sizes(
    benchmark=replace(sections.FULL, rounds={**sections.FULL.rounds, "encode": 12, "step": 10}),
    elements=2**13,
    seeds=2,
    many=2**24,
    linears=(
        *((12608, 768, 3072), (12608, 3072, 768)),  # vit_b_16's
        *((24576, 512, 2048), (256, 2048, 1000)),  # transformer_base's and resnet50's
        *((64, 16384, 64), (257, 771, 515)),  # sums that are split; what no tile fits
    ),
    convs=(
        # Of ResNets, where cuDNN has Winograd's algorithm; larger kernels, where it has Fourier's; and the rest.
        *(Conv(32, 64, 64, 56, 3), Conv(32, 128, 128, 28, 3), Conv(32, 256, 256, 14, 3), Conv(32, 512, 512, 7, 3)),
        *(Conv(16, 64, 64, 28, 5), Conv(16, 256, 256, 14, 5), Conv(16, 64, 64, 28, 7), Conv(8, 32, 32, 56, 11)),
        *(Conv(32, 3, 64, 112, 7, 2), Conv(32, 128, 128, 56, 3, 2), Conv(32, 256, 64, 56, 1), Conv(8, 17, 31, 23, 3)),
        *(Conv(32, 128, 128, 28, 3, 1, 32), Conv(32, 96, 96, 28, 3, 1, 96)),
    ),
    models=("resnet50", "vit_b_16", "transformer_base"),
    steps=("bf16 compiled", "luq bf16 compiled", "luq bf16"),
)
TINY = Sizes(
    benchmark=replace(
        sections.QUICK,
        elements={"cpu": 1000},
        rounds={"encode": 2, "step": 2},
        batches={**sections.QUICK.batches, "resnet8": 2, "transformer_tiny": 2},
    ),
    elements=300,
    seeds=1,
    many=2**14,
    linears=((24, 16, 40),),
    convs=(Conv(2, 4, 8, 6, 3), Conv(1, 4, 4, 5, 5, 2, 2)),
    models=("resnet8", "transformer_tiny"),
    steps=("bf16", "luq bf16"),  # compiling takes minutes
)
SIZES = {"cuda": FULL, "cpu": TINY}


def lines(device: torch.device) -> list[Line]:
    """In the order in which they run."""
    on_cpu = "" if device.type == "cuda" else "not run: needs a GPU"
    models = SIZES[device.type].models
    return [
        Line("machine", machine, 0.03),
        Line("kernels against the reference, bit for bit", bits, 0.15),
        Line("exact GEMMs: convolutions", partial(convolutions, settings=CONV_SETTINGS), 0.07),
        Line("exact GEMMs: linear layers", linear_layers, 0.04),
        Line("exact GEMMs: cuDNN's benchmark", partial(convolutions, settings=BENCHMARK_SETTINGS), 0.06),
        Line("pytest -m gpu", partial(tests, arguments=GPU_TESTS), 0.1, on_cpu),
        Line("encode against a copy's bandwidth", encode, 0.05),
        *(Line(f"step and peak memory: {model}", partial(step, model=model), 0.45 / len(models)) for model in models),
        Line("Triton's tests on the device", partial(tests, arguments=TRITON_TESTS), 0.05, on_cpu),
    ]


def machine(device: torch.device, sizes: Sizes, seconds: float) -> Iterator[Row]:
    """What is checked, with which versions of what."""
    known = describe(device, quick=device.type == "cpu")
    what = [known["machine"]["name"]]
    if device.type == "cuda":
        facts = torch.cuda.get_device_properties(device)
        what += [f"capability {facts.major}.{facts.minor}", f"{facts.multi_processor_count} multiprocessors"]
        what.append(f"{facts.total_memory / 2**30:.1f} GiB")
    yield Row("device", ", ".join(what), None, known)
    yield Row("versions", ", ".join(f"{name} {version}" for name, version in known["versions"].items()))
    commit = f"{known['git_commit'] or 'unknown'}{' with changes' * bool(known['git_dirty'])}"
    yield Row("commit, kernels", f"{commit}; {known['machine']['kernels']}")


def bits(device: torch.device, sizes: Sizes, seconds: float) -> Iterator[Row]:
    return same_bits.rows(device, sizes.elements, sizes.seeds, sizes.many)


def linear_layers(device: torch.device, sizes: Sizes, seconds: float) -> Iterator[Row]:
    return exact_gemms.rows("linear", list(linear_cases(sizes.linears, device)), LINEAR_SETTINGS)


def convolutions(device: torch.device, sizes: Sizes, seconds: float, settings: tuple[Setting, ...]) -> Iterator[Row]:
    return exact_gemms.rows("convolution", list(conv_cases(sizes.convs, device)), settings)


def tests(device: torch.device, sizes: Sizes, seconds: float, arguments: tuple[str, ...]) -> Iterator[Row]:
    """pytest in a process of its own; what it had found when its time was up counts."""
    command = [sys.executable, "-m", "pytest", "-vv", "-rfE", "--tb=short", "--color=no", "-p", "no:cacheprovider"]
    with tempfile.TemporaryFile("w+") as said:
        how = {"stdout": said, "stderr": subprocess.STDOUT, "cwd": ROOT, "timeout": max(seconds - ENDING, 1)}
        try:
            ended = f"exit code {subprocess.run([*command, *arguments], **how).returncode}"
        except subprocess.TimeoutExpired:
            ended = STOPPED
        said.seek(0)
        yield counted(said.read(), ended)


def counted(said: str, ended: str) -> Row:
    """A row from what pytest -vv said."""
    outcomes = [(name, outcome.lower()) for name, outcome in OUTCOME.findall(said)]
    kinds = "passed", "failed", "error", "skipped"
    counts = {kind: sum(outcome == kind for _, outcome in outcomes) for kind in kinds}
    wrong = [name for name, outcome in outcomes if outcome in ("failed", "error")]
    found = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    right = not wrong and counts["passed"] > 0 and ended in (STOPPED, "exit code 0")
    names = f": {'; '.join(wrong)}" if wrong else ""
    reasons = {"reasons": REASON.findall(said), "end": [] if right else said.splitlines()[-40:]}
    return Row("tests", f"{found} ({ended}){names}", right, {**counts, "wrong": wrong, **reasons})


def encode(device: torch.device, sizes: Sizes, seconds: float) -> Iterator[Row]:
    """Shares of the bandwidth of a copy on the device, bytes counted."""
    for case, _, ratios in sections.encode(device, sizes.benchmark, ()):
        for ratio in ratios:
            if ratio["against"] == "copy, bytes/s":
                yield judged(device, "encode", case, ratio)


def step(device: torch.device, sizes: Sizes, seconds: float, model: str) -> Iterator[Row]:
    """Training steps against that of the first contender, and the most memory that they take."""
    workload, known = sections.workload_of(model, sizes.benchmark), steps(device)
    first, *others = sizes.steps
    trainings = {name: Training(workload, device, **known[name][0]) for name in sizes.steps}
    contenders = [Contender(name, training) for name, training in trainings.items()]
    timings = interleave(contenders, sizes.benchmark.rounds["step"], device, settle=1)
    yield from (Row(name, why, False) for name, why in timings.left_out.items())
    for name in timings.rounds:
        text = f"{1e3 * timings.median(name):.4g} ms a step of {workload.shape}"
        yield Row(name, text, None, {"median": timings.median(name), "rounds": timings.rounds[name]})
    for name in others:
        if {name, first} <= timings.rounds.keys():
            yield judged(device, "step", model, {"what": name, "against": first, **timings.ratio(name, first)})
    peaks = {}
    for name in timings.rounds:
        # On a GPU what is compiled already; a CPU's allocations are recorded from the building on.
        built = trainings[name] if device.type == "cuda" else None
        options = known[name][0]
        peaks[name] = peak(lambda: built or Training(workload, device, **options), device)  # noqa: B023
        yield Row(f"{name}, peak memory", f"{peaks[name] / 1e6:.1f} MB", None, {"bytes": peaks[name]})
    for name in others:
        if {name, first} <= peaks.keys():
            share = peaks[name] / peaks[first]
            ratio = {"what": f"{name}, peak", "against": f"{first}, peak", "median": share}
            yield judged(device, "memory", model, {**ratio, "quartiles": [share, share], "min": share})


def judged(device: torch.device, section: str, case: str, ratio: dict) -> Row:
    """A ratio, right where the benchmark's requirement of a GPU is reached; without one neither right nor wrong."""
    same = (section, case, ratio["what"], ratio["against"])
    of_device = [each for each in REQUIREMENTS if each.device == device.type == "cuda"]  # sizes on a CPU are tiny
    required = next((each for each in of_device if (each.section, each.case, each.name, each.against) == same), None)
    low, high = ratio["quartiles"]
    found = f"{ratio['median']:.3g}" + (f" ({low:.3g} to {high:.3g})" if low < high else "")
    if required is not None:
        found += f"; required {required.limit(required.required)}, aim {required.limit(required.aim)}"
    right = required.reached(ratio) if required else None
    return Row(f"{case}: {ratio['what']} against {ratio['against']}", found, right, {"section": section, **ratio})
