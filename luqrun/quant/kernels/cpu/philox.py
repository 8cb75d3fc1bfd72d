"""Philox in compiled loops (numba): the words of a row of elements, as luqrun.quant.kernels.philox numbers them."""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import njit
from numba import types as nb
from numba.extending import intrinsic

from luqrun.quant.kernels.cpu.rows import row_loop, u32, u64
from luqrun.quant.kernels.cpu.sizes import LANES
from luqrun.quant.kernels.cpu.vectors import ADDRESS, INTS, constant, everywhere, shuffled, store
from luqrun.quant.kernels.philox import KEY_INCREMENTS, MULTIPLIERS, ROUNDS, SAMPLE_SLOTS

LOW = u64(0xFFFFFFFF)
_WIDTH, _VECTORS = 8, 4  # counters in a vector of uint64, and vectors side by side: each waits for its own rounds
TOGETHER = _WIDTH * _VECTORS  # counters whose words are drawn together
_WIDE = ir.VectorType(ADDRESS, _WIDTH)
_EVEN = [2 * lane for lane in range(_WIDTH)]  # where the low halves of a _WIDE lie in INTS


@njit(inline="always", error_model="numpy")
def _philox(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10 on uint64, of which only the low halves count: so the products need no other instructions."""
    for _ in range(ROUNDS):
        product0, product1 = u64(MULTIPLIERS[0]) * (c0 & LOW), u64(MULTIPLIERS[1]) * (c2 & LOW)
        c0, c2 = (product1 >> u64(32)) ^ c1 ^ k0, (product0 >> u64(32)) ^ c3 ^ k1
        c1, c3 = product1, product0
        k0, k1 = (k0 + u64(KEY_INCREMENTS[0])) & LOW, (k1 + u64(KEY_INCREMENTS[1])) & LOW
    return c0, c1, c2, c3


def _rounds(builder, counters, words):
    """_philox of vectors of counters whose high halves are one number: words are c1, c2, c3, k0, k1. To LLVM's IR."""
    c1, c2, c3, k0, k1 = (everywhere(builder, word, _WIDE) for word in words)
    low, half = constant(0xFFFFFFFF, _WIDE), constant(32, _WIDE)
    states = [(counter, c1, c2, c3) for counter in counters]
    for turn in range(ROUNDS):
        key0, key1 = (
            builder.add(key, constant(turn * increment & 0xFFFFFFFF, _WIDE))
            for key, increment in zip((k0, k1), KEY_INCREMENTS, strict=True)
        )
        # All of a round before the next: so the vectors' instructions do not wait for each other.
        products = [
            [
                builder.mul(builder.and_(c, low), constant(by, _WIDE))
                for c, by in zip(state[::2], MULTIPLIERS, strict=True)
            ]
            for state in states
        ]
        states = [
            (
                builder.xor(builder.xor(builder.lshr(product1, half), state[1]), key0),
                product1,
                builder.xor(builder.xor(builder.lshr(product0, half), state[3]), key1),
                product0,
            )
            for state, (product0, product1) in zip(states, products, strict=True)
        ]
    return [[builder.bitcast(word, INTS) for word in state] for state in states]


@intrinsic
def _store_words(typingctx, address, counter, c1, c2, c3, k0, k1):
    """The words of counters `counter` to counter + TOGETHER - 1, four after four."""

    def codegen(context, builder, signature, args):
        address, counter, *words = args
        first = everywhere(builder, counter, _WIDE)
        lanes = [[_WIDTH * k + lane for lane in range(_WIDTH)] for k in range(_VECTORS)]
        counters = [builder.add(first, ir.Constant(_WIDE, each)) for each in lanes]
        pair = [lane + (2 * _WIDTH if half else 0) for lane in _EVEN for half in (0, 1)]
        for k, (w0, w1, w2, w3) in enumerate(_rounds(builder, counters, words)):
            two, others = (builder.bitcast(shuffled(builder, *each, pair), _WIDE) for each in ((w0, w1), (w2, w3)))
            for half in range(2):
                order = [lane + other for lane in range(4 * half, 4 * half + 4) for other in (0, _WIDTH)]
                store(builder, shuffled(builder, two, others, order), address, 16 * _WIDTH * k + 8 * _WIDTH * half)
        return context.get_dummy_value()

    return nb.void(*[nb.uint64] * 7), codegen


def _lanes_of(rows):
    """An intrinsic that draws the words of so many rows of pixels: of a row, those of counters counter, counter + step,
    ... of LANES channels, each word's side by side, and word after word `apart` bytes apart. The next row has the next
    counters."""

    @intrinsic
    def store_lanes(typingctx, address, apart, counter, step, c1, c2, c3, k0, k1):
        def codegen(context, builder, signature, args):
            address, apart, counter, step, *words = args
            first, step = (everywhere(builder, each, _WIDE) for each in (counter, step))
            lanes = [[k + lane for lane in range(_WIDTH)] for k in range(0, LANES, _WIDTH)]
            of_lanes = [builder.add(first, builder.mul(step, ir.Constant(_WIDE, each))) for each in lanes]
            counters = [builder.add(each, constant(row, _WIDE)) for row in range(rows) for each in of_lanes]
            states = _rounds(builder, counters, words)
            for low, high in zip(states[::2], states[1::2], strict=True):
                for a, b in zip(low, high, strict=True):
                    store(builder, shuffled(builder, a, b, [*_EVEN, *(2 * _WIDTH + lane for lane in _EVEN)]), address)
                    address = builder.add(address, apart)
            return context.get_dummy_value()

        return nb.void(*[nb.uint64] * 9), codegen

    return store_lanes


_store_row, _store_two_rows = _lanes_of(1), _lanes_of(2)


@row_loop()
def stream_words(stream, sample):
    """philox.stream_words, as the uint64 array (4,) that the loops take."""
    c3 = u64(stream[5] * SAMPLE_SLOTS + sample)
    low, high = u64(stream[0]) & LOW, u64(stream[0]) >> u64(32)
    words = _philox(u64(stream[1] * 4 + stream[2]), u64(stream[3]), u64(stream[4]), c3, low, high)
    return np.array(words, dtype=np.uint64) & LOW


@row_loop()
def fill_words(words, group, count, name):
    """Random words of elements 4 group and up, two to a uint64: word k of Philox counter group + j is 4 j + k."""
    k0, k1, c2, c3 = name[0], name[1], name[2], name[3]
    high, last = u64(group) >> u64(32), u64(group) + u64(max(count, 1) - 1)
    carries = last >> u64(32) != high  # next to never: a high half that is one number saves a round's work
    together = 0 if carries else count // TOGETHER * TOGETHER
    for j in range(0, together, TOGETHER):
        _store_words(u64(words.ctypes.data) + u64(16 * j), u64(group) + u64(j), high, c2, c3, k0, k1)
    for j in range(together, count):
        counter = u64(group) + u64(j)
        w0, w1, w2, w3 = _philox(counter, counter >> u64(32), c2, c3, k0, k1)
        words[2 * j], words[2 * j + 1] = (w0 & LOW) | (w1 << u64(32)), (w2 & LOW) | (w3 << u64(32))


@row_loop()
def _draw(counters, high, carries, w0, w1, w2, w3, c2, c3, k0, k1):
    for j in range(counters.size):
        a, b, c, d = _philox(counters[j], counters[j] >> u64(32) if carries else high, c2, c3, k0, k1)
        w0[j], w1[j], w2[j], w3[j] = u32(a), u32(b), u32(c), u32(d)


@row_loop()
def fill_pixels(drawn, counters, words, group, step, name):
    """Random words of drawn (pixels, channels): four neighbouring pixels of a channel are the words of one counter.

    Pixel 0 of channel 0 is counter `group`, channels are `step` counters apart. Where these are no multiple of LANES,
    or a counter's high half changes, counters uint64 and words (4, n) uint32 are scratch for n >= pixels / 4 * channels
    counters: one long loop.
    """
    channels, rows, step = u64(drawn.shape[1]), u64(drawn.shape[0] // 4), u64(step)
    high, last = u64(group) >> u64(32), u64(group) + rows + channels * step
    flat, carries = drawn.reshape(-1), last >> u64(32) != high
    if channels % u64(LANES) == u64(0) and not carries:
        k0, k1, c2, c3, apart = name[0], name[1], name[2], name[3], u64(4) * channels
        for channel in range(u64(0), channels, u64(LANES)):
            to, counter = u64(drawn.ctypes.data) + u64(4) * channel, u64(group) + channel * step
            for row in range(u64(0), rows - rows % u64(2), u64(2)):
                _store_two_rows(to + u64(4) * row * apart, apart, counter + row, step, high, c2, c3, k0, k1)
            if rows % u64(2):
                row = rows - u64(1)
                _store_row(to + u64(4) * row * apart, apart, counter + row, step, high, c2, c3, k0, k1)
        return
    for row in range(rows):
        for channel in range(channels):
            counters[row * channels + channel] = u64(group) + row + channel * step
    wanted = counters[: rows * channels]
    _draw(wanted, high, carries, words[0], words[1], words[2], words[3], name[2], name[3], name[0], name[1])
    source, stride = words.reshape(-1), u64(words.shape[1])
    for row in range(rows):
        for k in range(u64(4)):
            to, at = (u64(4) * row + k) * channels, k * stride + row * channels
            for channel in range(channels):
                flat[to + channel] = source[at + channel]


@row_loop()
def transpose(word, drawn, pixels):
    """drawn[pixel, channel] = word[channel * pixels + pixel]."""
    flat = drawn.reshape(-1)
    channels = u64(drawn.shape[1])
    for pixel in range(u64(drawn.shape[0])):
        for channel in range(channels):
            flat[pixel * channels + channel] = word[channel * u64(pixels) + pixel]
