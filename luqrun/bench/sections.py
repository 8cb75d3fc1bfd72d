"""The four parts of the benchmark. Each yields, case by case, a record and the ratios that it gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from luqrun.bench.contenders import Training, Workload, encoders, layer_passes, steps
from luqrun.bench.memory import kept_for_backward, peak
from luqrun.bench.timing import Contender, Timings, interleave
from luqrun.profiling import by_kind

# (what, against): the ratios that are told of a case, as far as both took part.
ENCODE_PAIRS = [
    *((what, against) for what in ("e3m0", "e3m0 hindsight", "int4", "int4 packed") for against in ("clone", "copy")),
    *((f"{what} {slow}", what) for what in ("e3m0", "int4") for slow in ("formulas", "reference")),
]
STEP_PAIRS = [
    ("luq fp32", "fp32"),
    ("luq bf16", "fp32"),
    ("luq bf16", "bf16"),
    ("bf16", "fp32"),
    ("luq bf16 compiled", "bf16 compiled"),
    ("luq fp32, float GEMMs", "luq fp32"),
    ("luq bf16, float GEMMs", "luq bf16"),
    ("luq bf16 compiled, fused", "luq bf16 compiled"),
    ("formulas fp32", "fp32"),
    ("formulas fp32", "luq fp32"),
    ("formulas bf16", "luq bf16"),
    ("formulas bf16", "luq bf16 compiled"),
    ("formulas bf16 compiled", "luq bf16 compiled"),
]


@dataclass(frozen=True)
class Sizes:
    """How much is measured. elements: of an encoded tensor, by device; batches: by model; rounds: by section."""

    elements: Mapping[str, int]
    conv_images: int
    linear_rows: int
    batches: Mapping[str, int]
    rounds: Mapping[str, int]
    profiled_steps: int


FULL = Sizes(
    elements={"cpu": 2**22, "cuda": 2**27},
    conv_images=32,
    linear_rows=2080,
    batches={"resnet8": 128, "resnet18": 32, "resnet50": 256, "vit_b_16": 256},
    rounds={"encode": 40, "layer": 20, "step": 30},
    profiled_steps=5,
)
QUICK = Sizes(
    elements={"cpu": 2**18, "cuda": 2**22},
    conv_images=4,
    linear_rows=64,
    batches={"resnet8": 16, "resnet18": 2, "resnet50": 8, "vit_b_16": 8},
    rounds={"encode": 4, "layer": 2, "step": 2},
    profiled_steps=1,
)
IMAGES = {"resnet8": (1, 20, 47), "resnet18": (3, 32, 10), "resnet50": (3, 224, 1000), "vit_b_16": (3, 224, 1000)}
MODELS = {"cpu": ("resnet8", "resnet18"), "cuda": ("resnet50", "vit_b_16")}
MEMORY_MODELS = {"cpu": ("resnet18",), "cuda": ("resnet50", "vit_b_16")}

Case = tuple[str, dict, list[dict]]  # its name, its record, its ratios


def encode(device: torch.device, sizes: Sizes, models: tuple[str, ...]) -> Iterator[Case]:
    """Quantizers on one tensor of each precision, against copies of it, the formulas and the reference."""
    calls = 10 if device.type == "cuda" else 5
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        torch.manual_seed(0)
        x = torch.randn(sizes.elements[device.type], device=device, dtype=dtype)
        contenders, moved = encoders(x)
        timings = interleave(contenders, sizes.rounds["encode"], device, calls=calls, settle=2)
        ratios = _ratios(timings, ENCODE_PAIRS)
        for what in [name for name in moved if name != "copy" and name in timings.rounds]:
            slower = timings.ratio(what, "copy")
            share = {key: moved[what] / moved["copy"] / slower[key] for key in slower}
            ratios.append({"what": f"{what}, bytes/s", "against": "copy, bytes/s", **share})
        yield name, {"elements": x.numel(), "bytes": moved, **timings.as_record()}, ratios


def layer(device: torch.device, sizes: Sizes, models: tuple[str, ...]) -> Iterator[Case]:
    """Forward and backward passes of one convolution and one linear layer."""
    images = torch.randn(sizes.conv_images, 64, 32, 32, device=device)
    cases = {
        "conv 64-64, 3x3, 32x32": (
            nn.Conv2d(64, 64, 3, padding=1, bias=False).to(device, memory_format=torch.channels_last),
            images.contiguous(memory_format=torch.channels_last),
        ),
        "linear 768-3072": (nn.Linear(768, 3072).to(device), torch.randn(sizes.linear_rows, 768, device=device)),
    }
    for name, (module, x) in cases.items():
        timings = interleave(layer_passes(module, x), sizes.rounds["layer"], device, calls=2, settle=1)
        yield name, {"input": list(x.shape), **timings.as_record()}, _ratios(timings, STEP_PAIRS)


def step(device: torch.device, sizes: Sizes, models: tuple[str, ...]) -> Iterator[Case]:
    """Whole training steps, and by what kinds of operators their time is spent."""
    for model in _chosen(MODELS[device.type], models):
        workload = _workload(model, sizes)
        contenders = [
            Contender(name, Training(workload, device, **options), every)
            for name, (options, every) in steps(device).items()
        ]
        timings = interleave(contenders, sizes.rounds["step"], device)
        kinds = {
            contender.name: _kinds(contender.run, device, sizes.profiled_steps)
            for contender in contenders
            if contender.name in timings.rounds
        }
        record = {"workload": vars(workload), **timings.as_record(), "seconds_by_kind": kinds}
        yield model, record, _ratios(timings, STEP_PAIRS)


def memory(device: torch.device, sizes: Sizes, models: tuple[str, ...]) -> Iterator[Case]:
    """Bytes kept for the backward pass, and the most that a step has allocated."""
    for model in _chosen(MEMORY_MODELS[device.type], models):
        workload = _workload(model, sizes)
        peaks, kept, left_out = {}, {}, {}
        for name, (options, _) in steps(device).items():
            if "within" in options:  # the same memory in other kernels
                continue
            try:
                peaks[name] = peak(lambda: Training(workload, device, **options), device)  # noqa: B023
                if not options.get("compiled"):
                    kept[name] = kept_for_backward(Training(workload, device, **options))
            except torch.OutOfMemoryError:
                left_out[name] = "out of memory"
                torch.cuda.empty_cache()
        ratios = []
        for what, against in STEP_PAIRS:
            if what in peaks and against in peaks:
                ratios.append(_exact(f"{what}, peak", f"{against}, peak", peaks[what] / peaks[against]))
            if what in kept and against in kept:
                share = kept[what]["bytes"] / kept[against]["bytes"]
                ratios.append(_exact(f"{what}, kept", f"{against}, kept", share))
        for name, bytes_of in kept.items():
            if bytes_of["elements"]:
                share = bytes_of["layers"] / bytes_of["elements"]
                ratios.append(_exact(f"{name}, bytes kept by layers", "element", share))
        how = "torch.cuda.max_memory_allocated" if device.type == "cuda" else "allocations that torch.profiler recorded"
        record = {"workload": vars(workload), "how": how, "peak": peaks, "kept": kept, "left_out": left_out}
        yield model, record, ratios


SECTIONS = {"encode": encode, "layer": layer, "step": step, "memory": memory}


def _chosen(known: tuple[str, ...], wanted: tuple[str, ...]) -> list[str]:
    return [model for model in known if not wanted or model in wanted]


def _workload(model: str, sizes: Sizes) -> Workload:
    channels, size, classes = IMAGES[model]
    return Workload(model, channels, size, sizes.batches[model], classes)


def _ratios(timings: Timings, pairs: list[tuple[str, str]]) -> list[dict]:
    return [
        {"what": what, "against": against, **timings.ratio(what, against)}
        for what, against in pairs
        if what in timings.rounds and against in timings.rounds
    ]


def _exact(what: str, against: str, ratio: float) -> dict:
    return {"what": what, "against": against, "median": ratio, "min": ratio}


def _kinds(run: Callable[[], object], device: torch.device, count: int) -> dict[str, float]:
    """Seconds a step by kind, under the profiler."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as recorded:
        for _ in range(count):
            with record_function("training step"):
                run()
    return {kind: seconds / count for kind, seconds in by_kind(recorded).items()}
