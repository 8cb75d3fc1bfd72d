"""The kernels on the CPU, compiled by numba: one pass, Philox in the loop, all cores.

Same functions, signatures and codes as luqrun.kernels.reference. Element order is row-major whatever the memory
format, so a channels_last tensor needs no copy and gets the codes of its contiguous twin.
"""

from __future__ import annotations

import functools
import importlib

import numba
import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from luqrun.formats import Format
from luqrun.kernels.philox import KEY_INCREMENTS, MULTIPLIERS, ROUNDS, SAMPLE_SLOTS

u32, u64, i32, f32 = np.uint32, np.uint64, np.int32, np.float32
GROUPS = 256  # Philox calls a block: 4 KB of words and 4 KB of elements stay in the first-level cache
CHUNK = 1 << 16  # elements a task; fixed, so that sums do not depend on the number of threads
NEAREST, STOCHASTIC, FLUSH, UNUSED = 0, 1, 2, 3
MODES = {"nearest": NEAREST, "stochastic": STOCHASTIC, "flush": FLUSH}


def _openmp_found() -> bool:
    try:
        importlib.import_module("numba.np.ufunc.omppool")
    except ImportError:
        return False
    return True


# numba's own workqueue aborts when two Python threads enter it and sleeps between tasks: OpenMP, or one thread.
THREADED = _openmp_found()
if THREADED:
    numba.config.THREADING_LAYER = "omp"

inline = functools.partial(njit, inline="always", error_model="numpy")
# No fastmath: rounding must be IEEE's and NaN must survive.
driver = functools.partial(njit, parallel=THREADED, nogil=True, cache=True, error_model="numpy")


def describe() -> str:
    """What run.json records: the backend and its threads."""
    return f"numba {numba.__version__}, {numba.get_num_threads() if THREADED else 1} thread(s)"


@inline()
def _philox(c0, c1, c2, c3, k0, k1):
    for _ in range(ROUNDS):
        product0, product1 = u64(MULTIPLIERS[0]) * u64(c0), u64(MULTIPLIERS[1]) * u64(c2)
        c0 = u32(u32(u32(product1 >> u64(32)) ^ c1) ^ k0)
        c2 = u32(u32(u32(product0 >> u64(32)) ^ c3) ^ k1)
        c1, c3 = u32(product1), u32(product0)
        k0, k1 = u32(k0 + u32(KEY_INCREMENTS[0])), u32(k1 + u32(KEY_INCREMENTS[1]))
    return c0, c1, c2, c3


@njit(cache=True)
def _stream_words(stream, sample):
    """philox.stream_words, as the uint32 array (4,) that the kernels take."""
    c3 = u32(stream[5] * SAMPLE_SLOTS + sample)
    low, high = u32(stream[0]), u32(stream[0] >> 32)
    words = _philox(u32(stream[1] * 4 + stream[2]), u32(stream[3]), u32(stream[4]), c3, low, high)
    return np.array(words, dtype=np.uint32)


@inline()
def _fill_words(words, group, count, name):
    """Random words of elements 4 group and up, in order: words[4 j + k] is word k of Philox counter group + j."""
    for j in range(count):
        counter = u64(group) + u64(j)
        w0, w1, w2, w3 = _philox(u32(counter), u32(counter >> u64(32)), name[2], name[3], name[0], name[1])
        words[4 * j], words[4 * j + 1], words[4 * j + 2], words[4 * j + 3] = w0, w1, w2, w3


@inline()
def _fill_pixels(p0, p1, p2, p3, group, step, name):
    """Random words of four neighbouring pixels, a row of channels each; channels are `step` counters apart."""
    for j in range(p0.size):
        counter = u64(group) + u64(j) * u64(step)
        w0, w1, w2, w3 = _philox(u32(counter), u32(counter >> u64(32)), name[2], name[3], name[0], name[1])
        p0[j], p1[j], p2[j], p3[j] = w0, w1, w2, w3


@inline()
def _encode_row(x, bits, out, words, ratio, ratio_bits, scale, low, high, logarithmic, rounding, underflow):
    """Encode one row (1-D views of one length). The last three are constants, so each variant is a tight loop."""
    if logarithmic:
        for j in range(x.size):
            ratio[j] = min(abs(x[j]) / scale, high)
        for j in range(x.size):
            carry = i32(words[j] & u32(0x7FFFFF)) if rounding == STOCHASTIC else i32(0x400000)
            # A shift by more than 31 is undefined; below 1 its result is not used.
            power = i32(i32(1) << i32(i32(i32(i32(ratio_bits[j] + carry) >> i32(23)) - i32(127)) & i32(31)))
            if underflow == STOCHASTIC:
                below = i32(i32(words[j] >> u32(1)) < i32(ratio[j] * f32(2147483648)))
            elif underflow == NEAREST:
                below = i32(ratio[j] >= f32(0.5))
            else:
                below = i32(0)
            magnitude = power if ratio[j] >= f32(1) else below
            finite = i32(bits[j] & i32(0x7FFFFFFF)) < i32(0x7F800000)
            magnitude = magnitude if finite else i32(0)
            out[j] = i32(-magnitude) if bits[j] < i32(0) else magnitude
    else:
        for j in range(x.size):
            value = min(max(x[j] / scale, low), high)
            if rounding == NEAREST:
                code = i32(np.rint(value))
            else:
                # Of the magnitude: there the fraction is exact, also for a tiny negative value.
                floor = np.floor(abs(value))
                code = i32(floor) + i32(i32(words[j] >> u32(1)) < i32((abs(value) - floor) * f32(2147483648)))
                code = -code if bits[j] < i32(0) else code
            finite = i32(bits[j] & i32(0x7FFFFFFF)) < i32(0x7F800000)
            out[j] = code if finite else i32(0)


@functools.cache
def _flat_kernel(logarithmic: bool, rounding: int, underflow: int):
    """Encode x (n,), row-major order and memory order being one."""
    draws = STOCHASTIC in (rounding, underflow)

    @driver()
    def flat(x, bits, out, scale, low, high, name):
        for chunk in prange((x.size + CHUNK - 1) // CHUNK):
            words = np.empty(4 * GROUPS, np.uint32)
            ratio = np.empty(4 * GROUPS, np.float32)
            for start in range(chunk * CHUNK, min(x.size, (chunk + 1) * CHUNK), 4 * GROUPS):
                stop = min(x.size, start + 4 * GROUPS)
                if draws:
                    _fill_words(words, start // 4, (stop - start + 3) // 4, name)
                _encode_row(
                    x[start:stop], bits[start:stop], out[start:stop], words, ratio, ratio.view(np.int32),
                    scale, low, high, logarithmic, rounding, underflow,
                )  # fmt: skip

    return flat


@functools.cache
def _channels_last_kernel(logarithmic: bool, rounding: int, underflow: int):
    """Encode x (images, pixels, channels), with draws, whose elements are numbered (images, channels, pixels)."""

    @driver()
    def channels_last(x, bits, out, scale, low, high, name):
        images, pixels, channels = x.shape
        # Four neighbouring pixels of a channel share a Philox call, unless such groups straddle channels.
        aligned = pixels % 4 == 0
        block = min(pixels, max(4, 1024 // channels // 4 * 4))
        for image in prange(images):
            first = image * channels * pixels
            ratio = np.empty(block * channels, np.float32)
            drawn = np.empty((block, channels), np.uint32)
            words = np.empty(0 if aligned else (channels * pixels + 7) // 4 * 4, np.uint32)
            if not aligned:
                _fill_words(words, first // 4, words.size // 4, name)
            for start in range(0, pixels, block):
                count = min(block, pixels - start)
                if aligned:
                    for pixel in range(0, count, 4):
                        group = (first + start + pixel) // 4
                        _fill_pixels(
                            drawn[pixel], drawn[pixel + 1], drawn[pixel + 2], drawn[pixel + 3], group, pixels // 4, name
                        )
                else:
                    for channel in range(channels):
                        element = first % 4 + channel * pixels + start
                        drawn[:count, channel] = words[element : element + count]
                _encode_row(
                    x[image, start : start + count].reshape(-1), bits[image, start : start + count].reshape(-1),
                    out[image, start : start + count].reshape(-1), drawn.reshape(-1), ratio, ratio.view(np.int32),
                    scale, low, high, logarithmic, rounding, underflow,
                )  # fmt: skip

    return channels_last


@njit(nogil=True, error_model="numpy")
def _extremes(bits):
    """(bit pattern of max|x|, a number below 0 if any x is): patterns of non-negative floats order like integers,
    and NaN comes out above Inf. The casts keep numba from widening to 64 bits."""
    largest, negative = i32(0), i32(0)
    for j in range(bits.size):
        magnitude = i32(bits[j] & i32(0x7FFFFFFF))
        largest = max(largest, magnitude)
        negative = i32(negative | i32(bits[j] & i32(-magnitude)))  # both sign bits: negative, and not -0
    return largest, negative


@njit(nogil=True, error_model="numpy", fastmath={"reassoc"})
def _moments(x):
    """(sum |x|, sum x^2) in float64; free to reassociate, so that it vectorises."""
    sum1, sum2 = 0.0, 0.0
    for j in range(x.size):
        value = np.float64(abs(x[j]))
        sum1 += value
        sum2 += value * value
    return sum1, sum2


@functools.cache
def _statistics_kernel(moments: bool):
    @driver()
    def statistics(x, bits):
        tasks = (x.size + CHUNK - 1) // CHUNK
        extremes = np.zeros((tasks, 2), np.int32)
        sums = np.zeros((tasks, 2), np.float64)
        for task in prange(tasks):
            start, stop = task * CHUNK, min(x.size, (task + 1) * CHUNK)
            extremes[task, 0], extremes[task, 1] = _extremes(bits[start:stop])
            if moments:
                sums[task, 0], sums[task, 1] = _moments(x[start:stop])
        return extremes[:, 0].max(), extremes[:, 1].min(), sums[:, 0].sum(), sums[:, 1].sum()

    return statistics


def _dense(x: Tensor) -> Tensor:
    """x as float32 in contiguous or channels_last memory."""
    x = x.detach().float()
    if x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)):
        return x
    return x.contiguous()


def _in_memory_order(x: Tensor) -> Tensor:
    return x if x.is_contiguous() else x.permute(0, 2, 3, 1)


def statistics(x: Tensor, moments: bool) -> Tensor:
    """See reference.statistics."""
    if x.numel() == 0:
        return torch.zeros(4, dtype=torch.float64)
    flat = _in_memory_order(_dense(x)).reshape(-1).numpy()
    magnitude, negative, sum1, sum2 = _statistics_kernel(moments)(flat, flat.view(np.int32))
    return torch.tensor([np.int32(magnitude).view(np.float32), negative < 0, sum1, sum2], dtype=torch.float64)


def encode(
    x: Tensor,
    scale: Tensor,
    signed: Tensor,
    form: Format,
    rounding: str,
    underflow: str,
    stream: Tensor,
    sample: int = 0,
) -> Tensor:
    """See reference.encode."""
    x = _dense(x)
    codes = torch.empty_like(x, dtype=form.code_dtype)
    scale_value = f32(scale.item())
    if not scale_value > 0:
        return codes.zero_()
    if form.logarithmic:
        low, high, below = 0, form.limit, MODES[underflow]
    else:
        low, high = (-form.limit, form.limit) if signed.item() else (0, form.unsigned_limit)
        below = UNUSED
    variant = (form.logarithmic, MODES[rounding], below)
    name = _stream_words(stream.numpy(), sample)
    # Without draws the order of the elements does not matter.
    flat = x.is_contiguous() or STOCHASTIC not in variant[1:]
    kernel = _flat_kernel(*variant) if flat else _channels_last_kernel(*variant)
    shape = (-1,) if flat else (x.shape[0], x.shape[2] * x.shape[3], x.shape[1])
    source, target = (_in_memory_order(t).reshape(shape).numpy() for t in (x, codes))
    kernel(source, source.view(np.int32), target, scale_value, f32(low), f32(high), name)
    return codes
