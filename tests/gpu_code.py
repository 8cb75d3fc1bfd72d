"""Compile the Triton kernels for an H100 that need not be there, or each of them once for another compute capability
that the command line names (100: B200), and print what came out as JSON.

A script of its own: in the test process Triton interprets. Tensors are without data and may be of any size.
"""

import json
import re
import sys

import torch
from triton import JITFunction
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from luqrun.quant.encoding import Encoding
from luqrun.quant.formats import FORMATS
from luqrun.quant.grids import grid_of_axis
from luqrun.quant.kernels.cuda import backend as cuda


class Driver:
    """As much of a driver as compiling asks for; capability: 90 for an H100."""

    def __init__(self, capability):
        self.capability = capability

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)


def widths(ptx: str, instruction: str) -> list[int]:
    """Bytes that each global load or store of a thread moves."""
    found = re.findall(rf"\b{instruction}\.global\S*?(?:\.v(\d))?\.b(\d+)\s", ptx)
    return sorted(int(count or 1) * int(bits) // 8 for count, bits in found)


def compile_kernel(kernel, *arguments, grid, warmup, **options):
    """Instead of a launch."""
    code = run(kernel, *arguments, grid=grid, warmup=True, **options)
    ptx = code.asm["ptx"]
    facts = {
        "kernel": kernel.__name__,
        "case": case,
        "inexact": re.findall(r"\S*\.(?:ftz|approx|full)\b\S*", ptx) + re.findall(r"fma\.\S+", ptx),
        "rearranged": code.asm["ttgir"].count("ttg.convert_layout"),
        "loads": widths(ptx, "ld"),
        "stores": widths(ptx, "st"),
        "spilled": ".local" in ptx,
    }
    compiled.append(facts)


def tensor(*shape, dtype=torch.bfloat16, channels_last=False):
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=memory_format)


def encode(x, form, rounding, underflow, dtype, packed, observe):
    how = Encoding(form, rounding=rounding, underflow=underflow)
    cuda.encode(x, scale, signed, how, stream, 3, dtype, packed, observe)


def encode_blocks(x, block, axis, scale_format, dtype=torch.bfloat16, packed=True, **keys):
    """In blocks along an axis of a tensor that is contiguous, or in tiles over the last two."""
    how = Encoding("e2m1", block=block, scale_format=scale_format, **keys)
    cuda.encode_blocks(x, how, *grid_of_axis(how, x.shape, axis)[0], scale, stream, 3, dtype, packed)


def decode_blocks(axis, scale_format):
    how = Encoding("e2m1", block=16, scale_format=scale_format)
    grid = grid_of_axis(how, (1024, 256), axis)[0]
    cuda.decode_blocks(bits[: 2**17], bits[: 2**14], (1024, 256), False, how, *grid, bf16)


def encode_image():
    """In blocks along the channels of channels_last memory, with draws."""
    how = Encoding("e2m1", block=32, rounding="stochastic")
    cuda.encode_blocks(image, how, (64 * 28 * 28, 1, 1, 96), (1, 32), scale, stream, 3, bf16, False)


def quantize(x, form, rounding, range, estimate, pow2_scale=False):
    cuda.quantize(x, Encoding(form, range, rounding, pow2_scale=pow2_scale), estimate, stream, bf16, True)


compiled, case = [], ""
scale, signed, stream = tensor(dtype=torch.float32), tensor(dtype=torch.bool), tensor(6, dtype=torch.int64)
bf16, fp32, int8 = torch.bfloat16, torch.float32, torch.int8
image, odd = tensor(64, 96, 28, 28, channels_last=True), tensor(8, 5, 7, 7, dtype=fp32, channels_last=True)
bits, matrix = tensor(2**17, dtype=torch.uint8), tensor(4096, 1024)
CASES = {
    "gradient": lambda: encode(tensor(2**20), "e3m0", "stochastic", "stochastic", bf16, False, True),
    "gradient image": lambda: encode(image, "e3m0", "stochastic", "stochastic", bf16, True, True),
    "odd image": lambda: encode(odd, "int4", "stochastic", None, int8, True, False),
    "activation": lambda: encode(image, "int4", "nearest", None, bf16, True, False),
    "bytes": lambda: encode(tensor(2**20, dtype=fp32), "e3m0_div128", "nearest", "flush", torch.float16, True, False),
    "mantissa": lambda: encode(image, "e2m1", "stochastic", None, bf16, True, False),
    "beyond 2^31": lambda: encode(tensor(2**32), "int4", "stochastic", None, int8, False, False),
    "sawb": lambda: quantize(image, "int4", "nearest", "sawb", None),
    "power of two": lambda: quantize(image, "e3m0", "stochastic", "absmax", None, True),
    "estimate": lambda: quantize(image, "e3m0", "stochastic", "hindsight", scale),
    "unpack": lambda: cuda.unpack(bits, (2**18,), False, signed, FORMATS["e3m0"], bf16),
    "unpack e2m1": lambda: cuda.unpack(bits, (2**18,), False, signed, FORMATS["e2m1"], bf16),
    "unpack int4": lambda: cuda.unpack(bits, (2**18,), False, signed, FORMATS["int4"], int8),
    "moments": lambda: cuda.statistics(tensor(2**32), True),
    "maximum": lambda: cuda.statistics(tensor(2**16, dtype=fp32), False, scale),
    "mxfp4": lambda: encode_blocks(matrix, 32, -1, "e8m0"),
    "mxfp4 gradient": lambda: encode_blocks(matrix, 32, 0, "e8m0", packed=False, rounding="stochastic"),
    "mxfp4 image": encode_image,
    "mxfp4 beyond 2^31": lambda: encode_blocks(tensor(2**21, 1024), 32, -1, "e8m0", rounding="stochastic"),
    "nvfp4 tiles": lambda: encode_blocks(matrix, (16, 16), -1, "e4m3", headroom=0.9),
    "odd fp32": lambda: encode_blocks(tensor(99, 71, dtype=fp32), 31, -1, "fp32", fp32),
    "quest": lambda: encode_blocks(matrix, 32, -1, "e8m0", range="rms", scale_rounding="down"),
    "four over six": lambda: encode_blocks(matrix, 16, -1, "e4m3", rounding="stochastic", four_over_six="mse"),
    "eden": lambda: encode_blocks(matrix, 16, 0, "e4m3", eden=True),
    "decode mxfp4": lambda: decode_blocks(-1, "e8m0"),
    "decode nvfp4": lambda: decode_blocks(0, "e4m3"),
    "relu": lambda: cuda.relu_(tensor(2**16)),
    "relu6": lambda: cuda.relu_(tensor(2**16), 6.0),
    "relu backward": lambda: cuda.relu_backward(tensor(2**20), bits, False),
}
# Each kernel.
ON_OTHERS = (
    *("gradient image", "odd image", "activation", "sawb", "moments", "unpack", "relu", "relu backward"),
    *("mxfp4", "odd fp32", "four over six", "decode nvfp4"),
)

if __name__ == "__main__":
    capability = int((*sys.argv[1:], 90)[0])
    driver.set_active(Driver(capability))
    run, JITFunction.run = JITFunction.run, compile_kernel
    for case in CASES if capability == 90 else ON_OTHERS:
        CASES[case]()
    print(json.dumps(compiled))
