"""Whether GEMMs of codes are exact: what is exact is called so, and what is not is found."""

import dataclasses

import torch

from luqrun.bench import exact_gemms
from luqrun.bench.exact_gemms import CONV_SETTINGS, LINEAR_SETTINGS, Conv, Setting, check, conv_cases, linear_cases
from luqrun.quant.gemms import ConvOp

CPU = torch.device("cpu")


def test_settings_hold_within_and_are_put_back():
    def now():
        cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
        reduced = matmul.allow_bf16_reduced_precision_reduction
        return cudnn.allow_tf32, matmul.allow_tf32, reduced, cudnn.benchmark, cudnn.deterministic, cudnn.enabled

    before = now()
    setting = Setting(torch.float32, tf32=True, reduced=False, benchmark=True, deterministic=True, cudnn=False)
    with setting.within():
        assert now() == (True, True, False, True, True, False)
    assert now() == before
    names = [each.name for each in (*CONV_SETTINGS, *exact_gemms.BENCHMARK_SETTINGS)]
    assert len(set(names)) == len(names)
    assert [each.name for each in CONV_SETTINGS if each.used] == ["fp32", "bf16"]


CONVS = Conv(2, 4, 8, 6, 3), Conv(1, 4, 4, 5, 5, 2, 2)


def test_exact_convolutions_are_called_exact():
    cases = list(conv_cases(CONVS, CPU))
    assert len({(case.gemm, case.name) for case in cases}) == len(cases) == 2 * 2 * 3
    for dtype in (torch.float32, torch.bfloat16):
        row = check(cases, Setting(dtype, used=True)).row("convolution", Setting(dtype, used=True))
        assert row.found.startswith("exact: fprop 4 of 4, dgrad 4 of 4, wgrad 4 of 4;")
        assert row.right is True


def test_an_inexact_convolution_is_found(monkeypatch):
    cases, exact = list(conv_cases(CONVS, CPU)), ConvOp.fprop

    def as_winograd_might(op, a, w):
        product = exact(op, a, w)
        product[0, 0, 0, 0] += 0.25 if w.shape[-1] == 5 else 0
        return product

    monkeypatch.setattr(ConvOp, "fprop", as_winograd_might)
    cases = [dataclasses.replace(case, run=ConvOp.fprop.__get__(case.run.__self__)) if case.gemm == "fprop" else case
             for case in cases]  # fmt: skip
    *found, best = exact_gemms.rows("convolution", cases, CONV_SETTINGS[:4])
    assert found[0].right is False
    assert found[2].right is None  # not luqrun's setting
    for row in (found[0], found[2]):
        assert "fprop 2 of 4, dgrad 4 of 4, wgrad 4 of 4" in row.found
        assert (
            "not: fprop 5x5 4-4 on 5x5, stride 2, 2 groups, channels_last, 1 of 36 elements, off by 0.25" in row.found
        )
    assert best.found == "none"


def test_a_product_that_sums_bf16_parts_is_found(monkeypatch):
    cases = list(linear_cases(((24, 512, 40),), CPU))

    def in_parts(left, right):
        if left.dtype != torch.bfloat16 or not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction:
            return left @ right if left.dtype != torch.int8 else torch._int_mm(left, right)
        return sum(a @ b for a, b in zip(left.chunk(8, 1), right.chunk(8, 0), strict=True))

    cases = [dataclasses.replace(case, run=in_parts) for case in cases]
    *found, best = exact_gemms.rows("linear", cases, LINEAR_SETTINGS)
    assert [row.right for row in found[:3]] == [True, False, None]
    assert "not:" in found[1].found
    assert "bf16, no sums of bf16 parts (" in best.found
    assert "bf16 (" not in best.found


def test_a_unit_that_refuses_is_named():
    def refuse(left, right):
        raise RuntimeError("self.size(0) needs to be greater than 16\nand more")

    case = dataclasses.replace(next(linear_cases(((24, 16, 40),), CPU)), run=refuse)
    row = check([case], Setting(torch.int8)).row("linear", Setting(torch.int8))
    assert row.found == "took none; refused 1: fprop 24x16x40, RuntimeError: self.size(0) needs to be greater than 16"
    assert check([case], LINEAR_SETTINGS[0]).row("linear", LINEAR_SETTINGS[0]).right is False
