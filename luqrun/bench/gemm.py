"""The three GEMMs of a layer on 4-bit codes, by the unit that multiplies them: what decides which one layers take."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from luqrun.bench.timing import Contender, seconds
from luqrun.internals.of_torch import int_mm
from luqrun.quant.quantizer import Quantizer

FP8 = {"e4m3": "float8_e4m3fn", "e5m2": "float8_e5m2"}  # E3M0 is exact in both, INT4's 9 to 15 in e4m3 alone
EXACT_SUM = 2**24  # what fp32 sums stay exact below
FEW_ROWS, TOO_SLOW = 64, 0.1  # a unit that needs so many seconds for so few rows is emulated, and not timed


def operands(rows: int, inner: int, outer: int, device: torch.device) -> dict[str, tuple[Tensor, Tensor]]:
    """By GEMM, the int8 codes (M, K) and (K, N) of a linear layer inner -> outer on `rows` rows, as they lie there.

    Activations are INT4 0..15, as after a ReLU, weights INT4 -7..7, gradients E3M0. A 1x1 convolution of channels_last
    images is the same, its pixels the rows.
    """
    torch.manual_seed(0)
    int4, e3m0 = Quantizer("int4", "sawb", "nearest"), Quantizer("e3m0", "absmax", "stochastic")
    a = int4.quantize(torch.randn(rows, inner, device=device).relu()).codes
    w = int4.quantize(torch.randn(outer, inner, device=device)).codes
    g = e3m0.quantize(torch.randn(rows, outer, device=device)).codes
    return {"fprop INT4 x INT4": (a, w.t()), "dgrad E3M0 x INT4": (g, w), "wgrad E3M0 x INT4": (g.t(), a)}


def units(left: Tensor, right: Tensor, has_e3m0: bool) -> dict[str, Callable[[], Tensor]]:
    """By unit, the product of int8 codes (M, K) and (K, N), from codes in the type that it takes.

    They lie as those given. Where a unit wants rows on the left and columns on the right, the copies are part of it;
    int8 has both ways. `scaled`: with the pass over the product that multiplies by the scale and gives bf16; fp8's
    units do so by themselves. Units that a device or torch lacks raise when they are called.
    """
    on_gpu = left.device.type == "cuda"
    scale, one = (torch.full((), value, device=left.device) for value in (0.01, 1.0))

    def floating(dtype: torch.dtype) -> Callable[[], Tensor]:
        a, b = left.to(dtype), right.to(dtype)
        return lambda: a @ b

    def scaled_int8() -> Tensor:
        product = int_mm(left, right)
        return torch.mul(product, scale, out=torch.empty_like(product, dtype=torch.bfloat16))

    def fp8(left_form: str, fast: bool) -> Callable[[], Tensor]:
        def call() -> Tensor:
            how = {"scale_a": one, "scale_b": one, "out_dtype": torch.bfloat16, "use_fast_accum": fast}
            return torch._scaled_mm(a().contiguous(), _columns(b()), **how)

        a, b = (_as_fp8(x, form) for x, form in ((left, left_form), (right, "e4m3")))
        return call

    bf16 = floating(torch.bfloat16)
    found = {"fp32": floating(torch.float32), "bf16": bf16, "int8": lambda: int_mm(left, right)}
    if on_gpu:
        found["tf32"] = _with_tf32(found["fp32"])
    if not (left.is_contiguous() and right.t().is_contiguous()):
        found["int8, copied"] = lambda: int_mm(left.contiguous(), _columns(right))
    found |= {"bf16 scaled": lambda: bf16().mul_(scale), "int8 scaled": scaled_int8}
    for form in FP8 if has_e3m0 else ["e4m3"]:
        found[f"fp8 {form} x e4m3"] = fp8(form, fast=False)
        if on_gpu:
            found[f"fp8 {form} x e4m3, fast sums"] = fp8(form, fast=True)
    return found


def _as_fp8(x: Tensor, form: str) -> Callable[[], Tensor]:
    """x in fp8 once it is asked for: not every torch has the type, not every device can hold it."""
    kept = []

    def call() -> Tensor:
        if not kept:
            kept.append(x.float().to(getattr(torch, FP8[form])))
        return kept[0]

    return call


def _columns(x: Tensor) -> Tensor:
    """x with its columns contiguous, copied where they are not."""
    return x.t().contiguous().t()


def _with_tf32(product: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def call() -> Tensor:
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            return product()
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before

    return call


def checked(left: Tensor, right: Tensor, has_e3m0: bool) -> tuple[list[Contender], dict[str, bool], dict[str, str]]:
    """The units that work here; by unit, whether its product is exact; and by unit that does not work, why.

    Exact: the product of integers, rounded once to the type that the unit returns. It is computed in float64, which
    holds these sums as int64 does and which GPUs multiply, too.
    """
    expected = left.double() @ right.double()
    assert expected.abs().max() < EXACT_SUM
    contenders, exact, lacking = [], {}, {}
    few = units(left[:FEW_ROWS], right, has_e3m0)
    for name, call in units(left, right, has_e3m0).items():
        try:
            taken = seconds(few[name], calls=1, settle=1, device=left.device)
            if taken > TOO_SLOW:
                lacking[name] = f"{FEW_ROWS} of {len(left)} rows took {taken:.1f} s"
                continue
            product = call()
        except torch.OutOfMemoryError:
            lacking[name] = "out of memory"
        except (AttributeError, RuntimeError, TypeError, ValueError) as error:
            lacking[name] = (str(error).splitlines() or [type(error).__name__])[0][:160]
        else:
            contenders.append(Contender(name, call))
            if not name.endswith("scaled"):
                exact[name] = torch.equal(product, expected.float().to(product.dtype))
    return contenders, exact, lacking
