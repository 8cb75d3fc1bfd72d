"""Shares and Amdahl's bound, by hand."""

from dataclasses import replace

import pytest

from luqrun.config import CostConfig
from luqrun.cost import totals
from luqrun.cost.gemms import Gemm, Side
from luqrun.cost.products import ATTENTION, LAYER, UNKNOWN

INT4, FP32 = Side("activation", "int4", 4, 4), Side("weight", "fp32", 32, None)
# 900 multiply-accumulates at 4 bits, 60 in a layer that is skipped, 40 of attention.
AT_4 = Gemm("a", LAYER, "fprop", 1, 9, 10, 10, 900, (INT4, INT4), 4, kept_bits=801, moved_bits=80, quantized_bits=8)
SKIPPED = Gemm("b", LAYER, "fprop", 1, 6, 1, 10, 60, (FP32, FP32), None, why="last")
OF_TWO = Gemm("c", ATTENTION, "fprop", 2, 2, 1, 10, 40, (FP32, FP32), None, why="attention")
SPEEDS = CostConfig(speed_4bit=8.0, speed_8bit=4.0, speed_bf16=2.0, speed_fp32=1.0)


def test_shares():
    found = totals.shares([AT_4, SKIPPED, OF_TWO])
    assert found["layers"] == 900 / 960
    assert found["matrix"] == 0.9
    assert (found["fprop"], found["dgrad"]) == (900 / 960, 0.0)
    assert totals.shares([]) == dict.fromkeys(found, 0.0)


def test_grouped_convolutions_are_told_apart():
    grouped = replace(AT_4, groups=3, macs=100)
    found = totals.shares([AT_4, grouped])
    assert (found["layers"], found["without_grouped"]) == (1.0, 0.9)


def test_the_bound_is_amdahls():
    found = totals.bounds([AT_4, SKIPPED, OF_TWO], SPEEDS, "fp32")
    seconds = 900 / 8 + 100
    assert found == {
        "fp32": pytest.approx(1000 / seconds),
        "bf16": pytest.approx(500 / seconds),
        "8bit": pytest.approx((900 / 4 + 100) / seconds),
        "with_free_4bit": pytest.approx(10.0),
    }
    assert totals.bounds([AT_4], SPEEDS, "fp32")["with_free_4bit"] is None
    assert totals.bounds([SKIPPED], SPEEDS, "bf16") == {"fp32": 2.0, "bf16": 1.0, "8bit": 1.0, "with_free_4bit": 1.0}
    assert totals.bounds([], SPEEDS, "fp32") == dict.fromkeys(("fp32", "bf16", "8bit", "with_free_4bit"))


def test_samples_take_time_and_no_share():
    twice = replace(AT_4, passes=2)
    assert totals.shares([twice, SKIPPED]) == totals.shares([AT_4, SKIPPED])
    assert totals.seconds([twice], SPEEDS, "fp32") == 2 * 900 / 8


def test_what_is_not_known_is_named_and_is_no_zero_of_the_rest():
    blank = Gemm("d", UNKNOWN, "fprop", 1, 0, 0, 0, None, (FP32, FP32), None, why="unknown: Bilinear")
    gemms = [AT_4, SKIPPED, blank]
    assert totals.uncounted(gemms) == ["d"]
    assert totals.uncounted([AT_4]) == []
    assert totals.in_high_precision(gemms) == {"last": (1, 60, 0.0625), "unknown: Bilinear": (1, None, None)}
    known = replace(blank, macs=40)
    assert totals.shares([AT_4, SKIPPED, known])["layers"] == 0.9


def test_bytes_are_rounded_up():
    assert totals.size([AT_4, AT_4]) == {"kept": 201, "moved": 20, "quantizing": 2}
