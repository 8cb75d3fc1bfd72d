"""Philox in compiled loops (numba): the words of a row of elements, as luqrun.quant.kernels.philox numbers them."""

from __future__ import annotations

import numpy as np
from numba import njit

from luqrun.quant.kernels.cpu.rows import row_loop, u32, u64
from luqrun.quant.kernels.philox import KEY_INCREMENTS, MULTIPLIERS, ROUNDS, SAMPLE_SLOTS

LOW = u64(0xFFFFFFFF)
LANES = 16  # channels whose words are drawn together


@njit(inline="always", error_model="numpy")
def _philox(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10 on uint64, of which only the low halves count: so the products need no other instructions."""
    for _ in range(ROUNDS):
        product0, product1 = u64(MULTIPLIERS[0]) * (c0 & LOW), u64(MULTIPLIERS[1]) * (c2 & LOW)
        c0, c2 = (product1 >> u64(32)) ^ c1 ^ k0, (product0 >> u64(32)) ^ c3 ^ k1
        c1, c3 = product1, product0
        k0, k1 = (k0 + u64(KEY_INCREMENTS[0])) & LOW, (k1 + u64(KEY_INCREMENTS[1])) & LOW
    return c0, c1, c2, c3


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
    for j in range(count):
        counter = u64(group) + u64(j)
        w0, w1, w2, w3 = _philox(counter, counter >> u64(32) if carries else high, c2, c3, k0, k1)
        words[2 * j], words[2 * j + 1] = (w0 & LOW) | (w1 << u64(32)), (w2 & LOW) | (w3 << u64(32))


@row_loop()
def _draw(counters, high, carries, w0, w1, w2, w3, c2, c3, k0, k1):
    for j in range(counters.size):
        a, b, c, d = _philox(counters[j], counters[j] >> u64(32) if carries else high, c2, c3, k0, k1)
        w0[j], w1[j], w2[j], w3[j] = u32(a), u32(b), u32(c), u32(d)


@row_loop()
def _draw_lanes(flat, to, channels, counter, step, high, carries, c2, c3, k0, k1):
    # A number of turns that is known makes vectors of them; four pixels' words lie `channels` apart.
    for lane in range(u64(LANES)):
        each = counter + lane * step
        a, b, c, d = _philox(each, each >> u64(32) if carries else high, c2, c3, k0, k1)
        at = to + lane
        flat[at], flat[at + channels] = u32(a), u32(b)
        flat[at + u64(2) * channels], flat[at + u64(3) * channels] = u32(c), u32(d)


@row_loop()
def fill_pixels(drawn, counters, words, group, step, name):
    """Random words of drawn (pixels, channels): four neighbouring pixels of a channel are the words of one counter.

    Pixel 0 of channel 0 is counter `group`, channels are `step` counters apart. Where these are no multiple of LANES,
    counters uint64 and words (4, n) uint32 are scratch for n >= pixels / 4 * channels counters: one long loop.
    """
    channels, rows, step = u64(drawn.shape[1]), u64(drawn.shape[0] // 4), u64(step)
    high, last = u64(group) >> u64(32), u64(group) + rows + channels * step
    flat, carries = drawn.reshape(-1), last >> u64(32) != high
    if channels % u64(LANES) == u64(0):
        for row in range(rows):
            for channel in range(u64(0), channels, u64(LANES)):
                counter, to = u64(group) + row + channel * step, u64(4) * row * channels + channel
                _draw_lanes(flat, to, channels, counter, step, high, carries, name[2], name[3], name[0], name[1])
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
