"""Compiled loops (numba) over one row of a tensor, short enough for the first-level cache: packing and scales.
`encode` has those that encode, `statistics` those that measure, and `masks` the ReLU's; `quantize` and `loops` drive
them over whole tensors, on all cores.

`bits` are bit patterns: int32 of float32, and where it is said uint16 of bf16.
"""

from __future__ import annotations

import functools
import hashlib
import logging
from pathlib import Path

import numpy as np
from llvmlite import binding
from numba import config, njit

from luqrun.errors import UserError

log = logging.getLogger(__name__)

u8, u16, u32, u64, i32, f32, f64 = np.uint8, np.uint16, np.uint32, np.uint64, np.int32, np.float32, np.float64
NEAREST, STOCHASTIC, FLUSH, UNUSED = 0, 1, 2, 3
ABSMAX, SAWB, HINDSIGHT, GIVEN = 0, 1, 2, 3  # where the scale comes from
MODES = {"nearest": NEAREST, "stochastic": STOCHASTIC, "flush": FLUSH, None: UNUSED}

if config.DISABLE_JIT:
    raise UserError(
        "NUMBA_DISABLE_JIT leaves the CPU without kernels: unset it, or set LUQRUN_KERNELS=reference (slow)"
    )
# What numba compiles for: this CPU, unless something else was asked for (NUMBA_CPU_FEATURES, NUMBA_CPU_NAME=generic).
_host = config.CPU_FEATURES is None
_features = (binding.get_host_cpu_features().flatten() if _host else config.CPU_FEATURES).split(",")
# Without the instruction a fused multiply-add would be a function's call.
HAS_FMA = "+neon" in _features or ("+fma" in _features and bool(config.ENABLE_AVX))
# The modules that hold compiled functions.
_LOOPS = (
    "block_loops", "block_rows", "block_scales", "block_sums", "columns", "dot_tiles", "driver", "encode", "loops",
    "masks", "memory", "norm_loops", "normalize_loops", "philox", "quantize", "rotation", "rows", "sizes",
    "statistics", "tile_loops", "vectors", "weight_loops", "winograd_loops", "winograd_tiles", "winograd_wgrad_loops",
)  # fmt: skip
_DIGEST = hashlib.sha256(b"".join(Path(__file__).with_stem(name).read_bytes() for name in _LOOPS)).hexdigest()[:8]


def row_loop(**options):
    """Compile a loop. No fastmath by default: rounding must be IEEE's and NaN must survive. Flags that a loop depends
    on are arguments: LLVM moves the tests of one out of it."""

    def compiled(function):
        # numba's cache knows the file of a function, not those of the functions that it calls.
        function.__qualname__ = f"{function.__name__}_{_DIGEST}"
        how = {"nogil": True, "error_model": "numpy", **options}
        try:
            return njit(cache=True, **how)(function)
        except RuntimeError as error:
            if "cannot cache" not in str(error):
                raise
            warn_of_no_cache()
            return njit(**how)(function)

    return compiled


@functools.cache
def warn_of_no_cache() -> None:
    log.warning("compiled loops cannot be kept and are compiled in each run: no folder is writable (NUMBA_CACHE_DIR)")


@row_loop()
def patterns(bits, buffer):
    """float32 bit patterns of a row of bf16's: those are their upper halves."""
    for j in range(bits.size):
        buffer[j] = i32(u32(bits[j]) << u32(16))
    return buffer[: bits.size]


@row_loop()
def copy(source, target):
    for j in range(source.size):
        target[j] = source[j]


@row_loop()
def clear(target):
    for j in range(target.size):
        target[j] = 0


@row_loop()
def fill(target, value):
    for j in range(target.size):
        target[j] = value


@row_loop()
def to_bf16(codes, target):
    """Codes as bit patterns of bf16, which holds them exactly."""
    floats = codes.astype(np.float32)
    bits = floats.view(np.int32)
    for j in range(codes.size):
        target[j] = u16(bits[j] >> i32(16))


@row_loop()
def as_float(pattern):
    """The float32 with this bit pattern."""
    return np.array([pattern], np.int32).view(np.float32)[0]


@row_loop()
def clip(kind, found, count, c1, c2, hindsight):
    """Quantizer.measure's clip, from (-, -, max|x|, -, sum|x|, sum x^2) of `count` elements."""
    maximum = f32(found[2])
    if kind == SAWB:
        value = f32(c1 * np.sqrt(found[5] / max(count, 1)) - c2 * (found[4] / max(count, 1)))
        return min(value, maximum) if value > 0 else maximum
    return f32(hindsight) if kind == HINDSIGHT and hindsight > 0 else maximum


@row_loop()
def scale(clip, limit, pow2_scale):
    """Quantizer._scale, bit for bit."""
    value = f32(clip / limit)
    if f64(value) * f64(limit) < f64(clip) and value < f32(2.0**-126):
        value = f32(value + f32(2.0**-149))
    if pow2_scale:
        pattern = np.array([value], np.float32).view(np.int32)[0]
        power = as_float(i32(i32(pattern + i32(0x7FFFFF)) & i32(0x7F800000)))
        fits = f64(power) * f64(limit) <= f64(f32(3.4028234663852886e38)) or not np.isfinite(clip)
        value = power if fits else as_float(i32(pattern & i32(0x7F800000)))
    return value


@row_loop()
def to_fields(codes, fields, magnitude, floating, bits):
    """Format.to_fields of a row; magnitude is float32 scratch; floating: see Format."""
    sign, every = i32(i32(1) << i32(bits - 1)), i32(i32(i32(1) << i32(bits)) - i32(1))
    exponents, mantissa = magnitude.view(np.int32), i32(floating - 1)
    if floating == 1:
        for j in range(codes.size):
            magnitude[j] = f32(abs(i32(codes[j])))
        for j in range(codes.size):
            exponent = max(i32(i32(exponents[j] >> i32(23)) - i32(126)), i32(0))
            fields[j] = u8(i32(exponent | (sign if codes[j] < 0 else i32(0))))
    elif floating > 1:
        for j in range(codes.size):
            magnitude[j] = f32(abs(i32(codes[j])))
        for j in range(codes.size):
            shift = max(i32(i32(i32(exponents[j] >> i32(23)) - i32(127)) - mantissa), i32(0))
            index = i32(i32(shift << mantissa) + i32(i32(abs(i32(codes[j]))) >> shift))
            fields[j] = u8(i32(index | (sign if codes[j] < 0 else i32(0))))
    else:
        for j in range(codes.size):
            fields[j] = u8(i32(codes[j]) & every)


@row_loop()
def from_fields(fields, codes, signed, floating, bits):
    """Format.from_fields of a row."""
    top = i32(i32(1) << i32(bits - 1))
    if floating == 1:
        for j in range(codes.size):
            exponent = i32(i32(fields[j]) & i32(top - i32(1)))
            magnitude = i32(i32(i32(1) << exponent) >> i32(1))  # 0 for 0
            codes[j] = i32(-magnitude) if i32(i32(fields[j]) & top) != i32(0) else magnitude
    elif floating > 1:
        mantissa = i32(floating - 1)
        for j in range(codes.size):
            index = i32(i32(fields[j]) & i32(top - i32(1)))
            shift = max(i32(i32(index >> mantissa) - i32(1)), i32(0))
            magnitude = i32(i32(index - i32(shift << mantissa)) << shift)
            codes[j] = i32(-magnitude) if i32(i32(fields[j]) & top) != i32(0) else magnitude
    else:
        flip = top if signed else i32(0)
        for j in range(codes.size):
            codes[j] = i32(i32(i32(fields[j]) ^ flip) - flip)


@row_loop()
def extend_signs(fields, codes, signed, bits):
    """from_fields of an integer format, to int8 (as uint8) straight away."""
    flip = u8(u8(1) << u8(bits - 1)) if signed else u8(0)
    for j in range(fields.size):
        codes[j] = u8(u8(fields[j] ^ flip) - flip)


@row_loop()
def join(fields, packed):
    """Two fields of 4 bits to a byte, the first one low; their upper halves do not count."""
    for j in range(fields.size // 2):
        packed[j] = u8(u8(fields[2 * j] & u8(15)) | u8(fields[2 * j + 1] << u8(4)))
    if fields.size % 2:
        packed[fields.size // 2] = fields[fields.size - 1] & u8(15)


@row_loop()
def split(packed, fields):
    """The inverse of `join`."""
    for j in range(fields.size // 2):
        byte = u32(packed[j])
        fields[2 * j], fields[2 * j + 1] = u8(byte & u32(15)), u8(byte >> u32(4))
    if fields.size % 2:
        fields[fields.size - 1] = packed[fields.size // 2] & u8(15)


@row_loop()
def rescale(sums, scale, out):
    """Integers (int32) times a scale: float32."""
    for j in range(sums.size):
        out[j] = f32(sums[j]) * scale


@row_loop()
def round_to_bf16(bits, out):
    """float32 to the nearest bf16, ties to even; torch's NaN for NaN."""
    for j in range(bits.size):
        nearest = (bits[j] + i32(0x7FFF) + ((bits[j] >> i32(16)) & i32(1))) >> i32(16)
        out[j] = u16(0x7FC0) if (bits[j] & i32(0x7FFFFFFF)) > i32(0x7F800000) else u16(nearest)
