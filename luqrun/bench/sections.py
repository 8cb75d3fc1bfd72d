"""The parts of the benchmark. Each yields, case by case, a record and the ratios that it gives."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from luqrun.bench.contenders import Training, block_encoders, encoders, layer_passes, steps
from luqrun.bench.gemm import checked, operands
from luqrun.bench.memory import kept_for_backward, peak, resident_peaks
from luqrun.bench.timing import Contender, Timings, interleave, left_out, turns, wait
from luqrun.bench.workloads import SMALL_TEXT, TEXT, TextWorkload, Workload
from luqrun.quant.kernels.cpu.process import keep_threads
from luqrun.runtime.memory import KEPT, MMAP_THRESHOLD, TOP_PAD
from luqrun.train.profiling import by_kind

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
    ("luq fp32 compiled", "fp32 compiled"),
    ("luq bf16 compiled", "bf16 compiled"),
    *((f"{name} compiled", name) for name in ("fp32", "bf16", "luq fp32", "luq bf16")),
    ("luq fp32, float GEMMs", "luq fp32"),
    ("luq bf16, float GEMMs", "luq bf16"),
    ("luq bf16 compiled, fused", "luq bf16 compiled"),
    ("formulas fp32", "fp32"),
    ("formulas fp32", "luq fp32"),
    ("formulas bf16", "luq bf16"),
    ("formulas bf16", "luq bf16 compiled"),
    ("formulas bf16 compiled", "luq bf16 compiled"),
]


# channels, pixels, classes
IMAGES = {
    **dict.fromkeys(("resnet8", "resnext8", "mobilenet_tiny", "vit_tiny"), (1, 20, 47)),
    "resnet18": (3, 32, 10),
    **dict.fromkeys(("resnet50", "vit_b_16"), (3, 224, 1000)),
}
# of a sentence or window; in the vocabulary
TOKENS = {"transformer_tiny": (22, 10_000), "transformer_base": (32, 40_000), "minilm": (256, 30_522)}
SMALL = [model for model, (_, pixels, _) in IMAGES.items() if pixels == 20]
MODELS = {
    "cpu": ("resnet8", "resnet18", "resnext8", "mobilenet_tiny", "vit_tiny", *SMALL_TEXT),
    "cuda": ("resnet50", "vit_b_16"),
}
FORMAT_MODELS = ("resnet18", "vit_tiny")
SCHEMES = (
    *("luq", "mxfp4", "mxfp4_rht_sr", "tetrajet", "quartet"),
    *("nvfp4", "nvfp4_nvidia", "nvfp4_46", "quartet2", "fp4_all_the_way"),
)
MEMORY_MODELS = {"cpu": ("resnet18",), "cuda": ("resnet50", "vit_b_16")}
EAGER = ("fp32", "bf16", "luq fp32", "luq bf16")
EAGER_ONLY = ("resnext8", "mobilenet_tiny", "vit_tiny", *SMALL_TEXT)  # measured briefly
ALONE = "resnet8"  # measured with one thread, too
# glibc keeps freed blocks of up to 32 MiB in its heap, where holes add up; a fixed threshold gives them back, and the
# command line keeps all (luqrun.runtime.memory).
ALLOCATORS = {
    "resident": {},
    "resident, blocks given back": {"MALLOC_MMAP_THRESHOLD_": str(2**18)},
    "resident, memory kept": {
        "MALLOC_MMAP_THRESHOLD_": str(KEPT[MMAP_THRESHOLD]),
        "MALLOC_TRIM_THRESHOLD_": str(2**62),
        "MALLOC_TOP_PAD_": str(KEPT[TOP_PAD]),
    },
}


@dataclass(frozen=True)
class Sizes:
    """How much is measured. elements: of an encoded tensor, by device; gemms: by device and layer, its rows, inputs and
    outputs; batches: by model; compiled: models that are measured compiled, too; rounds: by section; profiled: rounds
    under the profiler, and steps in each; resident: measurements of the resident memory."""

    elements: Mapping[str, int]
    conv_images: int
    linear_rows: int
    gemms: Mapping[str, Mapping[str, tuple[int, int, int]]]
    batches: Mapping[str, int]
    compiled: tuple[str, ...]
    rounds: Mapping[str, int]
    profiled: tuple[int, int]
    resident: int


FULL = Sizes(
    elements={"cpu": 2**22, "cuda": 2**27},
    conv_images=32,
    linear_rows=2080,
    gemms={
        "cpu": {"linear": (2080, 768, 3072), "1x1 conv": (8192, 256, 64)},
        "cuda": {"linear": (256 * 197, 768, 3072), "1x1 conv": (256 * 14 * 14, 1024, 256)},  # vit_b_16's, resnet50's
    },
    batches={
        **{"resnet18": 32, "resnet50": 256, "vit_b_16": 256, **dict.fromkeys(SMALL, 128)},
        **{"transformer_tiny": 93, "transformer_base": 768, "minilm": 16},
    },
    compiled=("resnet8", "resnet18", "resnet50", "vit_b_16"),
    rounds={"encode": 40, "layer": 20, "gemm": 10, "step": 20},
    profiled=(3, 2),
    resident=3,
)
QUICK = Sizes(
    elements={"cpu": 2**18, "cuda": 2**22},
    conv_images=4,
    linear_rows=64,
    gemms={key: {"linear": (64, 128, 256), "1x1 conv": (128, 64, 32)} for key in ("cpu", "cuda")},
    batches={"resnet18": 2, "resnet50": 8, "vit_b_16": 8, **dict.fromkeys(SMALL, 16), **dict.fromkeys(TEXT, 2)},
    compiled=("resnet8", "resnet50", "vit_b_16"),  # resnet18 takes minutes on a CPU
    rounds={"encode": 4, "layer": 2, "gemm": 2, "step": 2},
    profiled=(2, 1),
    resident=1,
)

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
            more = moved[what] / moved["copy"]
            share = {key: more / slower[key] for key in ("median", "min")}
            share["quartiles"] = [more / each for each in reversed(slower["quartiles"])]
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


def gemm(device: torch.device, sizes: Sizes, models: tuple[str, ...]) -> Iterator[Case]:
    """The GEMMs of a linear layer and of a 1x1 convolution on codes, by unit, each checked for exactness first."""
    calls, settle = (20, 5) if device.type == "cuda" else (2, 1)
    for layer_name, shape in sizes.gemms[device.type].items():
        for name, (left, right) in operands(*shape, device).items():
            contenders, exact, lacking = checked(left, right, "E3M0" in name)
            timings = interleave(contenders, sizes.rounds["gemm"], device, calls=calls, settle=settle)
            timings.left_out |= lacking
            scaled = [unit for unit in timings.rounds if unit == "int8 scaled" or unit.startswith("fp8")]
            pairs = [(unit, against) for against in ("fp32", "bf16") for unit in exact if unit != against]
            ratios = _ratios(timings, pairs + [(unit, "bf16 scaled") for unit in scaled])
            product = [left.shape[0], left.shape[1], right.shape[1]]
            yield f"{layer_name}, {name}", {"product": product, "exact": exact, **timings.as_record()}, ratios


def step(device: torch.device, sizes: Sizes, models: tuple[str, ...]) -> Iterator[Case]:
    """Whole training steps, and by what kinds of operators their time is spent."""
    for model in _chosen(MODELS[device.type], models):
        names = EAGER if model in EAGER_ONLY else _wanted(model, device, sizes)
        yield model, *_steps(model, device, sizes, names)
        if model == ALONE and torch.get_num_threads() > 1:
            with _one_thread():
                yield f"{model}, 1 thread", *_steps(model, device, sizes, EAGER)


def _wanted(model: str, device: torch.device, sizes: Sizes) -> list[str]:
    known = steps(device).items()
    return [name for name, (options, _) in known if model in sizes.compiled or not options.get("compiled")]


def _steps(model: str, device: torch.device, sizes: Sizes, names: Iterable[str]) -> tuple[dict, list[dict]]:
    """The record and the ratios of these contenders."""
    workload, known = workload_of(model, sizes), steps(device)
    contenders = [Contender(name, Training(workload, device, **known[name][0]), known[name][1]) for name in names]
    # After a step of its own, as in a training: another network's would leave it cold caches.
    timings = interleave(contenders, sizes.rounds["step"], device, settle=1)
    kinds = _kinds([each for each in contenders if each.name in timings.rounds], device, *sizes.profiled)
    record = {"workload": _described(workload), **timings.as_record(), "seconds_by_kind": kinds}
    torch.compiler.reset()  # what was compiled goes with its network
    return record, _ratios(timings, STEP_PAIRS) + _fastest(timings)


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    keep_threads(1)  # torch.set_num_threads would make attention slower in all that is measured afterwards
    try:
        yield
    finally:
        keep_threads(threads)


def memory(device: torch.device, sizes: Sizes, models: tuple[str, ...]) -> Iterator[Case]:
    """Bytes kept for the backward pass, the most that a step has allocated, and on a CPU the most that was resident."""
    on_gpu = device.type == "cuda"
    for model in _chosen(MEMORY_MODELS[device.type], models):
        workload = workload_of(model, sizes)
        peaks, kept, without = {}, {}, {}
        resident = {how: {} for how in ([] if on_gpu else ALLOCATORS)}

        def measure(name: str, options: dict) -> None:
            peaks[name] = peak(lambda: Training(workload, device, **options), device)  # noqa: B023
            if not options.get("compiled"):
                kept[name] = kept_for_backward(Training(workload, device, **options))  # noqa: B023
            for how, found in resident.items():  # noqa: B023
                grown = resident_peaks(workload, options, sizes.resident, ALLOCATORS[how])  # noqa: B023
                if grown:
                    found[name] = grown

        for name, (options, _) in steps(device).items():
            if "within" in options or (options.get("compiled") and not on_gpu):  # the same memory in other kernels
                continue
            why = left_out(lambda: measure(name, options))  # noqa: B023
            if why:
                without[name] = why
            torch.compiler.reset()
        ratios = _memory_ratios(peaks, kept, resident)
        how = "torch.cuda.max_memory_allocated" if on_gpu else "allocations that torch.profiler recorded"
        record = {"workload": _described(workload), "how": how, "peak": peaks, "kept": kept, "resident": resident}
        yield model, {**record, "left_out": without}, ratios


def _memory_ratios(peaks: dict, kept: dict, resident: dict) -> list[dict]:
    ratios = []
    for what, against in STEP_PAIRS:
        if what in peaks and against in peaks:
            ratios.append(_exact(f"{what}, peak", f"{against}, peak", peaks[what] / peaks[against]))
        for how, grown in resident.items():
            if what in grown and against in grown:
                ratio = Timings(grown).ratio(what, against)
                ratios.append({"what": f"{what}, {how}", "against": f"{against}, {how}", **ratio})
        if what in kept and against in kept:
            share = kept[what]["bytes"] / kept[against]["bytes"]
            ratios.append(_exact(f"{what}, kept", f"{against}, kept", share))
    for name, bytes_of in kept.items():
        if bytes_of["elements"]:
            share = bytes_of["layers"] / bytes_of["elements"]
            ratios.append(_exact(f"{name}, bytes kept by layers", "element", share))
    return ratios


def formats(device: torch.device, sizes: Sizes, models: tuple[str, ...]) -> Iterator[Case]:
    """Quantizers in blocks against a clone, and a training step of every scheme against fp32."""
    torch.manual_seed(0)
    x = torch.randn(sizes.elements[device.type] // 1024, 1024, device=device)
    timings = interleave(block_encoders(x), sizes.rounds["encode"] // 2, device, calls=2, settle=1)
    names = [name for name in timings.rounds if name != "clone"]
    yield "encode", {"elements": x.numel(), **timings.as_record()}, _ratios(timings, [(n, "clone") for n in names])
    for model in _chosen(FORMAT_MODELS, models):
        workload = workload_of(model, sizes)
        schemes = {"fp32": "plain", **{scheme: scheme for scheme in SCHEMES}}
        contenders = [Contender(name, Training(workload, device, each, False)) for name, each in schemes.items()]
        timings = interleave(contenders, sizes.rounds["step"] // 2, device, settle=1)
        record = {"workload": _described(workload), **timings.as_record()}
        yield model, record, _ratios(timings, [(name, "fp32") for name in SCHEMES])


SECTIONS = {"encode": encode, "layer": layer, "gemm": gemm, "step": step, "memory": memory, "formats": formats}


def _chosen(known: tuple[str, ...], wanted: tuple[str, ...]) -> list[str]:
    return [model for model in known if not wanted or model in wanted]


def workload_of(model: str, sizes: Sizes) -> Workload | TextWorkload:
    if model in TEXT:
        return TEXT[model](model, sizes.batches[model], *TOKENS[model])
    channels, size, classes = IMAGES[model]
    return Workload(model, channels, size, sizes.batches[model], classes)


def _described(workload: Workload | TextWorkload) -> dict:
    return {**vars(workload), "shape": workload.shape}


def _ratios(timings: Timings, pairs: list[tuple[str, str]]) -> list[dict]:
    return [
        {"what": what, "against": against, **timings.ratio(what, against)}
        for what, against in pairs
        if what in timings.rounds and against in timings.rounds
    ]


def _fastest(timings: Timings) -> list[dict]:
    """LUQ's fastest form against the plain network's, in each precision and whatever the precision, where either has
    more than one."""
    ratios = []
    names = [name for name in timings.rounds if not name.startswith("formulas")]
    for precision in ("fp32", "bf16", ""):
        ours = [name for name in names if name.startswith("luq") and precision in name]
        plain = [name for name in names if not name.startswith("luq") and precision in name]
        if ours and plain and len(ours) + len(plain) > 2:
            best, other = (min(family, key=timings.median) for family in (ours, plain))
            what, against = (f"{prefix}{precision}".strip() for prefix in ("luq ", "" if precision else "plain"))
            ratio = timings.ratio(best, other)
            ratios.append({"what": f"{what}, fastest: {best}", "against": f"{against}, fastest: {other}", **ratio})
    return ratios


def _exact(what: str, against: str, ratio: float) -> dict:
    return {"what": what, "against": against, "median": ratio, "quartiles": [ratio, ratio], "min": ratio}


def _kinds(contenders: list[Contender], device: torch.device, rounds: int, count: int) -> dict[str, dict[str, float]]:
    """By contender, seconds a step by kind under the profiler: medians over `rounds` turns of `count` steps."""
    found = {contender.name: [] for contender in contenders}
    for _, order in turns(contenders, rounds):
        for contender in order:
            found[contender.name].append(_profiled(contender.run, device, count))
    return {
        name: {kind: statistics.median(each[kind] for each in measured) for kind in measured[0]}
        for name, measured in found.items()
    }


def _profiled(run: Callable[[], object], device: torch.device, count: int) -> dict[str, float]:
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    wait(device)
    with profile(activities=activities) as recorded:
        for _ in range(count):
            with record_function("training step"):
                run()
        wait(device)
    return {kind: seconds / count for kind, seconds in by_kind(recorded).items()}
