"""The Triton kernels as a GPU gets them: compiled without one, chosen by device, and as operators."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import luqrun
from luqrun.errors import UserError
from luqrun.quant import kernels
from luqrun.quant.encoding import Encoding
from luqrun.quant.kernels import ops, reference
from luqrun.quant.kernels.philox import make_stream

triton = pytest.importorskip("triton")

from luqrun.quant.kernels.cuda import backend as cuda  # noqa: E402

ON_GPU = torch.cuda.is_available() and not triton.knobs.runtime.interpret
STREAM = make_stream(5, 3, 2, 7, 1, 4)


def launched():
    """The names of the kernels that the torch sides launch."""
    sources = (Path(module.__file__).read_text() for module in (cuda, cuda.blocks))
    return {name for source in sources for name in re.findall(r"launch\w*\(\s*kernels\.(\w+)", source)}


@pytest.mark.parametrize("capability", [90, 100])  # of an H100, and of a B200
def test_kernels_compile_for_a_gpu(tmp_path, capability):
    environment = dict(os.environ, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path), OMP_NUM_THREADS="1")
    environment["PYTHONPATH"] = str(Path(luqrun.__file__).parents[1])
    script = Path(__file__).parents[1] / "gpu_code.py"
    command = [sys.executable, str(script), str(capability)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    compiled = json.loads(done.stdout)
    assert {code["kernel"] for code in compiled} == launched()
    assert len(launched()) == 13
    for code in compiled:
        # Flushed subnormals, approximate quotients and fused products would not give the reference's codes.
        assert not code["inexact"], code
        assert not code["spilled"], code
        if code["kernel"] == "encode_blocks" and code["case"] != "odd fp32":
            # 16 elements a thread: two vectors of values, one of fields, and the scales of its blocks.
            assert code["stores"][-2:] == [16, 16], code
            assert len(code["stores"]) <= 4, code
        elif code["kernel"] == "decode_blocks":
            assert code["stores"] == [16, 16], code
        elif code["kernel"] in ("encode_flat", "encode_channels_last") and code["case"] != "odd image":
            # 16 elements a thread, and as many bytes of fields at most, go out as vectors of 4 or more, without a
            # detour through shared memory: the tiles have their shape for that.
            assert len(code["stores"]) <= 2 * 16 / 4, code
            assert not code["rearranged"], code


@pytest.mark.skipif(ON_GPU, reason="with a GPU, Triton does not take CPU tensors")
@pytest.mark.parametrize("shape", [(40,), (2, 3, 4, 4)])
def test_operators_run_on_them(monkeypatch, shape):
    monkeypatch.setattr(ops, "backend_for", lambda device_type: cuda)
    x = torch.randn(shape)
    x = x.to(memory_format=torch.channels_last) if x.dim() == 4 else x
    rest = (
        torch.tensor(0.1),
        torch.tensor(True),
        Encoding("int4", rounding="stochastic").key,
        STREAM,
        3,
        torch.bfloat16,
        True,
        True,
    )
    found, how = ops.encode(x, *rest), Encoding("int4", rounding="stochastic")
    for one, other in zip(found, reference.encode(x, *rest[:2], how, *rest[3:]), strict=True):
        assert torch.equal(one, other)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.luqrun.encode, (x, *rest), test_utils=checks)
    torch.library.opcheck(torch.ops.luqrun.statistics, (x, True), test_utils=checks)
    torch.library.opcheck(torch.ops.luqrun.relu_, (x.clone(),), test_utils=checks)
    quantize = Encoding("int4", "sawb").key, None, STREAM, torch.bfloat16, True
    torch.library.opcheck(torch.ops.luqrun.quantize, (x, *quantize), test_utils=checks)
    unpack = found[1], list(shape), x.dim() == 4, rest[1], "int4", torch.int8
    torch.library.opcheck(torch.ops.luqrun.unpack, unpack, test_utils=checks)


def test_they_serve_gpus_and_nothing_else(monkeypatch):
    choose = kernels.choose_backend
    monkeypatch.delenv("LUQRUN_KERNELS", raising=False)
    assert choose("cuda") is cuda
    assert f"triton {triton.__version__}" in cuda.describe()
    monkeypatch.setenv("LUQRUN_KERNELS", "cuda")
    assert choose("cuda") is cuda
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UserError, match=r"LUQRUN_KERNELS=cuda.*cpu"):
        choose("cpu")


def test_without_triton_a_gpu_is_refused_with_advice(monkeypatch):
    monkeypatch.delenv("LUQRUN_KERNELS", raising=False)
    for name in ("backend", "loops", "elements"):
        monkeypatch.delitem(sys.modules, f"luqrun.quant.kernels.cuda.{name}", raising=False)
        monkeypatch.delattr(kernels.cuda, name, raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(UserError, match=r"pip install triton.*LUQRUN_KERNELS=reference"):
        kernels.choose_backend("cuda")
    monkeypatch.setenv("LUQRUN_KERNELS", "reference")
    assert kernels.choose_backend("cuda") is importlib.import_module("luqrun.quant.kernels.reference")
