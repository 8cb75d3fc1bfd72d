"""Time by kind: names of operators and kernels, what is around them, and the table."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from luqrun.quant.convert import quantize_model
from luqrun.recipes import recipe
from luqrun.train import profiling
from luqrun.train.profiling import DATA, KINDS, OTHER, StepProfiler, by_kind, kind_of, kinds_table

NAMES = {
    "GEMM": (
        *("aten::convolution", "aten::mkldnn_convolution", "ConvolutionBackward0", "aten::addmm", "aten::mm"),
        *("AddmmBackward0", "aten::_int_mm", "luqrun::int8_conv", "luqrun::int8_conv_wgrad", "aten::linear"),
        *("luqrun::int8_linear", "luqrun::int8_linear_wgrad"),
        *("onednn::qconv2d_pointwise", "sm90_xmma_gemm_bf16", "nvjet_hsh_128x128", "aten::matmul"),
    ),
    "quantize": ("luqrun::quantize", "luqrun::encode", "QuantizedGemm", "QuantizedGemmBackward"),
    "statistics": ("luqrun::statistics",),
    "unpack": ("luqrun::unpack",),
    "normalisation": (
        "aten::native_batch_norm",
        "NativeLayerNormBackward0",
        "triton_red_fused_native_batch_norm_relu_3",
    ),
    "ReLU": ("aten::relu_", "luqrun::relu_backward", "aten::threshold_backward", "triton_poi_fused_relu_convolution_1"),
    "optimizer": ("Optimizer.step#SGD.step", "aten::_foreach_add_", "aten::_fused_sgd_"),
    "data": (DATA, "enumerate(DataLoader)#_SingleProcessDataLoaderIter.__next__"),
    None: (
        *("aten::add_", "aten::convert", "aten::_to_copy", "aten::empty", "triton_poi_fused_add_convolution_0"),
        *("autograd::engine::evaluate_function: ConvolutionBackward0", "aten::comm"),
    ),
}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in NAMES.items() for name in names])
def test_names(kind, name):
    assert kind_of(name) == kind


def event(name, parent=None, self_us=0.0, kernels=(), device=DeviceType.CPU):
    launched = [SimpleNamespace(name=kernel, duration=us) for kernel, us in kernels]
    return SimpleNamespace(
        name=name, cpu_parent=parent, self_cpu_time_total=self_us, kernels=launched, device_type=device
    )


def seconds(events):
    return {kind: round(1e6 * value) for kind, value in profiling._sum(events).items() if value}


def test_what_says_nothing_belongs_to_what_is_around_it():
    gemm = event("luqrun::int8_conv", self_us=1)
    node = event("autograd::engine::evaluate_function: QuantizedGemmBackward", self_us=2)
    optimizer = event("Optimizer.step#SGD.step", self_us=8)
    batch = event(DATA)
    inside = [
        event("aten::copy_", event("aten::to", gemm), 4),
        event("aten::add_", node, 16),
        event("aten::mm", optimizer, 32),
        event("aten::bmm", batch, 64),
        event("aten::copy_", event("luqrun::unpack", event("QuantizedGemmBackward", node)), 128),
    ]
    found = seconds([gemm, node, optimizer, batch, *inside])
    assert found == {"GEMM": 1 + 4, OTHER: 2 + 16, "optimizer": 8 + 32, "data": 64, "unpack": 128}


def test_where_there_are_kernels_their_time_counts():
    optimizer = event("Optimizer.step#SGD.step", self_us=500, kernels=[("Optimizer.step#SGD.step", 900)])
    events = [
        optimizer,
        event("aten::add_", optimizer, 50, [("vectorized_elementwise_kernel", 1)]),
        event("aten::convolution", None, 50, [("nchwToNhwcKernel", 2), ("sm90_xmma_fprop_gemm", 4)]),
        event(
            "CompiledFunction", None, 50, [("triton_red_fused_native_batch_norm_1", 8), ("triton_poi_fused_add_2", 16)]
        ),
        event("sm90_xmma_fprop_gemm", device=DeviceType.CUDA, self_us=4),
    ]
    assert seconds(events) == {"optimizer": 1, "GEMM": 2 + 4, "normalisation": 8, OTHER: 16}


@pytest.mark.usefixtures("by_operators")
def test_a_profiled_layer_has_its_kinds():
    layer = quantize_model(nn.Conv2d(4, 8, 3, bias=False), recipe("luq", skip=()))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    with profile(activities=[ProfilerActivity.CPU]) as recorded, record_function("step"):
        layer(x).sum().backward()
        optimizer.step()
    found = by_kind(recorded)
    assert list(found) == [*KINDS, OTHER]
    assert all(found[kind] > 0 for kind in ("GEMM", "quantize", "unpack", "optimizer", OTHER))
    assert found["normalisation"] == found["ReLU"] == found["data"] == 0
    (whole,) = (each for each in recorded.events() if each.name == "step")
    assert sum(found.values()) == pytest.approx(whole.cpu_time_total / 1e6, rel=0.05)


def steps_of(profiler, count):
    for _ in range(count):
        torch.ones(3).add_(1)
        profiler.step()
    profiler.close()


@pytest.mark.parametrize(
    ("wanted", "left", "done", "said"),
    [
        (4, 100, 50, "profile of 4 steps: "),
        (4, 6, 6, "profile of 4 steps: "),  # with two to warm up
        (20, 8, 8, "profile of 7 steps (of 20 asked for: the run had no more): "),
        (4, 100, 5, "profile of 2 steps (of 4 asked for"),  # stopped
        (20, 1, 1, "tracking.profile_steps=20: nothing was profiled, as the run ended after 1 steps, and 1 are"),
        (4, 100, 3, "tracking.profile_steps=4: nothing was profiled"),
        (4, 0, 0, "tracking.profile_steps=4: nothing was profiled, as the run ended after 0 steps"),
    ],
)
def test_what_was_profiled_is_said(tmp_path, caplog, wanted, left, done, said):
    with caplog.at_level("INFO"):
        steps_of(StepProfiler(tmp_path, wanted, left, torch.device("cpu")), done)
    assert [said in record.getMessage() for record in caplog.records] == [True]
    assert (tmp_path / "profile" / "kinds.md").exists() == said.startswith("profile")
    assert (tmp_path / "profile" / "trace.json").exists() == said.startswith("profile")


QUIET = """
import torch
from pathlib import Path
from luqrun.train.profiling import StepProfiler
profiler = StepProfiler(Path("."), 1, 9, torch.device("cpu"))
for _ in range(9):
    torch.ones(3).add_(1)
    profiler.step()
profiler.close()
"""


def test_a_profile_of_a_cpu_says_nothing_of_gpus(tmp_path):
    command = [sys.executable, "-c", QUIET]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert (found.stdout, found.stderr) == ("", "")
    assert (tmp_path / "profile" / "trace.json").exists()


def test_nothing_is_said_where_nothing_is_asked_for(tmp_path, caplog):
    steps_of(StepProfiler(tmp_path, 0, 100, torch.device("cpu")), 10)
    assert (caplog.records, list(tmp_path.iterdir())) == ([], [])


def test_the_table_has_a_row_for_each_kind_that_took_time():
    nothing = dict.fromkeys((*KINDS, OTHER), 0.0)
    text = kinds_table({"a": {**nothing, "GEMM": 0.03, OTHER: 0.01}, "b": {**nothing, "unpack": 0.02}}, steps=2)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    assert rows[0] == ["kind", "a, ms", "b, ms"]
    assert rows[2:] == [
        ["GEMM", "15.00 (75%)", "0.00 (0%)"],
        ["unpack", "0.00 (0%)", "10.00 (100%)"],
        ["other", "5.00 (25%)", "0.00 (0%)"],
        ["all", "20.00", "10.00"],
    ]
