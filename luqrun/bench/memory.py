"""What a training step keeps and what it needs at most, in bytes."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from itertools import accumulate
from multiprocessing import get_context
from unittest import mock

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from luqrun.bench.contenders import Training
from luqrun.bench.workloads import Workload
from luqrun.quant.convert import quantized_layers
from luqrun.quant.layers import QuantConv2d, QuantLinear
from luqrun.runtime.devices import peak_memory, reset_peak_memory


def kept_for_backward(training: Training) -> dict[str, int]:
    """Bytes that autograd keeps between the passes of one step of an uncompiled model, parameters excepted.

    bytes: of all storages, each counted once; layers: of those that quantized linear layers and convolutions keep;
    elements: of the activations and weights that these layers quantize.
    """
    known = {parameter.untyped_storage().data_ptr() for parameter in training.model.parameters()}
    found, inside, handles = {"bytes": 0, "layers": 0, "elements": 0}, [], []

    def enter(layer, inputs):
        inside.append(layer)
        found["elements"] += inputs[0].numel() + layer.weight.numel()

    def leave(layer, inputs, output):
        inside.pop()

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:  # the graph holds all of them: no address comes twice
            known.add(storage.data_ptr())
            found["bytes"] += storage.nbytes()
            found["layers"] += storage.nbytes() if inside else 0
        return tensor

    for _, layer in quantized_layers(training.model):
        if isinstance(layer, (QuantConv2d, QuantLinear)):
            handles += [layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave)]
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            training.loss().backward()
    finally:
        for handle in handles:
            handle.remove()
    training.optimizer.zero_grad(set_to_none=True)
    return found


def peak(make: Callable[[], Training], device: torch.device) -> int:
    """The most bytes allocated at once by a training that `make` builds: state, batch and its second step.

    On a GPU the allocator counts; on a CPU torch's allocations are added up from the profiler's record of them. What
    oneDNN and numba's loops take for themselves is not among them, nor is what the allocator holds in reserve: see
    `resident_peaks`.
    """
    if device.type == "cuda":
        return _peak_on_gpu(make(), device)
    with ThreadPoolExecutor(1) as fresh:  # a thread without the memory that earlier steps left for the next ones
        return fresh.submit(_peak_on_cpu, make).result()


def _peak_on_gpu(training: Training, device: torch.device) -> int:
    for _ in range(3):  # compiles, makes the optimizer's state
        training()
    training.optimizer.zero_grad(set_to_none=True)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    training()
    return training.state_bytes() + torch.cuda.max_memory_allocated(device) - before


def _peak_on_cpu(work: Callable[[], Training]) -> int:
    """Everything from the building on is recorded: what was allocated before, the profiler would not see freed."""

    def two_steps():
        training = work()
        training()
        training()

    return peak_of_allocations(two_steps)


def resident_peaks(workload: Workload, options: dict, count: int, allocator: dict[str, str]) -> list[int]:
    """`count` times: by how many bytes the resident memory of a process of its own grew for a training on the CPU and
    two of its steps, at most. All that is allocated counts, whoever does it, and what the allocator gave not back.

    options: of Training. allocator: environment variables that glibc's malloc reads as the process starts. What is
    loaded, compiled and cached by a first training is not counted. Empty where the system does not let a process
    forget its peak.
    """
    with mock.patch.dict(os.environ, allocator), ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
        return fresh.submit(_resident_peaks, workload, options, count, torch.get_num_threads()).result()


def _resident_peaks(workload: Workload, options: dict, count: int, threads: int) -> list[int]:
    torch.set_num_threads(threads)
    device = torch.device("cpu")

    def two_steps():
        training = Training(workload, device, **options)
        training()
        training()

    two_steps()
    grown = []
    for _ in range(count):
        reset_peak_memory(device)
        before = peak_memory(device)  # now what is resident
        held = torch.ones(2**22)
        if peak_memory(device) < before + held.nbytes // 2:  # a peak of earlier
            return []
        del held
        two_steps()
        grown.append(peak_memory(device) - before)
    return grown


def peak_of_allocations(work: Callable[[], object]) -> int:
    """The most bytes of CPU memory that torch had allocated at once for `work`, of what it allocated itself."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate((event.nbytes() for event in events), initial=0))
