"""Random layers whose GEMMs are compared with int64 arithmetic, bit for bit, through the layers' ops.

For tests/quant/test_exactness.py and scripts/exactness.py. Each case is a layer of random sizes and random
codes; each is computed with int8 codes, of patches and by oneDNN's convolution, and in floating point, on any CPU.
"""

import random
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from unittest import mock

import torch
import torch.nn.functional as F

from luqrun.quant.gemms import ConvOp, LinearOp
from luqrun.quant.kernels.cpu import int8, int8_library, int8_products, int8_winograd

LAST = torch.channels_last
CHANNELS = (1, 2, 3, 4, 5, 7, 8, 12, 15, 16, 17, 24, 31, 32, 33, 48, 64, 65)
LIMITS = (7, 15, 63, 64, 127)  # INT4's codes with and without a sign, E3M0's, INT8's
EXACT_FLOATS = 1 << 24
ROUTES = int8.BLOCKS, int8.WINOGRAD, "patches", "direct", "floating point"


@dataclass(frozen=True)
class Case:
    """A layer and the sizes of its operands: a (activation), w (weight), g (gradient of the output)."""

    kind: str
    op: LinearOp | ConvOp
    a: tuple[int, ...]
    w: tuple[int, ...]
    g: tuple[int, ...]
    signed: bool  # the activation's codes
    limits: tuple[int, int, int]  # of |a|, |w|, |g|
    channels_last: tuple[bool, bool, bool]
    dtype: torch.dtype
    seed: int

    def operands(self) -> list[torch.Tensor]:
        """int8 a, w and g."""
        generator, made = torch.Generator().manual_seed(self.seed), []
        for size, limit, last, signed in zip(
            (self.a, self.w, self.g), self.limits, self.channels_last, (self.signed, True, True), strict=True
        ):
            low = -limit if signed else 0
            codes = torch.randint(low, limit + 1, size, dtype=torch.int8, generator=generator)
            if self.seed % 3 == 0:  # as large as sums can be
                codes = torch.where(codes < 0, -limit, limit).char()
            made.append(codes.to(memory_format=LAST) if last and len(size) == 4 else codes)
        return made


def draw(number: int, seed: int = 0) -> Case:
    """The random layer of this number."""
    rng = random.Random(f"{seed} {number}")
    common = {
        "signed": rng.random() < 0.7,
        "limits": tuple(rng.choice(LIMITS if rng.random() < 0.5 else LIMITS[:1]) for _ in range(3)),
        "channels_last": tuple(rng.random() < 0.5 for _ in range(3)),
        "dtype": rng.choice((torch.float32, torch.float32, torch.bfloat16)),
        "seed": rng.randrange(2**31),
    }
    if rng.random() < 0.15:
        rows, inner, outer = rng.choice(((), (1,), (5,), (2, 3), (70,))), rng.choice(CHANNELS), rng.choice(CHANNELS)
        return Case("linear", LinearOp(), (*rows, inner), (outer, inner), (*rows, outer), **common)
    groups = rng.choice((1, 1, 1, 1, 2, 3, 4))
    # Groups that fill vectors, alone or some of them together, or do not.
    of_groups = (4, 8, 16, 32) if groups > 1 and rng.random() < 0.5 else CHANNELS
    c_in, c_out = (max(rng.choice(of_groups) // (groups if of_groups is CHANNELS else 1), 1) * groups for _ in range(2))
    if rng.random() < 0.1:
        groups = c_out = c_in  # depthwise
    plain = groups == 1 and rng.random() < 0.25  # what Winograd's tiles are for
    if plain:
        c_in, c_out = (rng.choice((16, 32, 48, 64, 80)) for _ in range(2))
    while True:
        one = rng.random() < 0.2
        kernel = (1, 1) if one else (rng.choice((1, 2, 3, 3, 4, 5, 7)), rng.choice((1, 1, 2, 3, 3, 5)))
        stride = (1, 1) if rng.random() < 0.5 else (rng.randint(1, 3), rng.randint(1, 3))
        dilation = (1, 1) if rng.random() < 0.7 else (rng.randint(1, 3), rng.randint(1, 3))
        if plain:
            kernel, stride, dilation = (3, 3), (1, 1), (1, 1)
        padding = tuple(rng.choice((0, taps // 2, rng.randint(0, taps + 1))) for taps in kernel)
        size = rng.choice((1, 2, 3, 5, 7, 8, 12, 17, 33)), rng.choice((1, 2, 3, 5, 7, 8, 12, 17, 33))
        out = tuple(
            int8.out_size(*end) if end[0] + 2 * end[3] > end[4] * (end[1] - 1) else 0
            for end in zip(size, kernel, stride, padding, dilation, strict=True)
        )
        images = rng.choice((1, 1, 2, 3))
        if min(out) > 0 and images * out[0] * out[1] * c_in * c_out * kernel[0] * kernel[1] // groups < 1 << 22:
            break
    kind = "1 x 1" if kernel == (1, 1) else "tall" if kernel[0] > kernel[1] else "wide or square"
    kind = "grouped" if groups > 1 else "dilated" if dilation != (1, 1) and kernel != (1, 1) else kind
    op = ConvOp(stride, padding, dilation, groups)
    shapes = (images, c_in, *size), (c_out, c_in // groups, *kernel), (images, c_out, *out)
    return Case(kind, op, *shapes, **common)


def exact(case: Case, a, w, g) -> dict[str, torch.Tensor]:
    """The three GEMMs in int64, a convolution's as a sum over the elements of its kernel."""
    a, w, g, op = a.long(), w.long(), g.long(), case.op
    if isinstance(op, LinearOp):
        wgrad = g.reshape(-1, g.shape[-1]).t() @ a.reshape(-1, a.shape[-1])
        return {"fprop": a @ w.t(), "dgrad": g @ w, "wgrad": wgrad}
    (high, wide), out, groups = op.padding, g.shape[2:], op.groups
    padded = F.pad(a, (wide, wide, high, high)).unflatten(1, (groups, -1))
    w, g = w.unflatten(0, (groups, -1)), g.unflatten(1, (groups, -1))
    fprop, dgrad, wgrad = torch.zeros_like(g), torch.zeros_like(padded), torch.zeros_like(w)
    for r in range(w.shape[3]):
        for s in range(w.shape[4]):
            ends = zip((r, s), op.dilation, op.stride, out, strict=True)
            seen = (..., *[slice(at * apart, at * apart + (n - 1) * step + 1, step) for at, apart, step, n in ends])
            tap = w[..., r, s]
            fprop += torch.einsum("ngchw,gkc->ngkhw", padded[seen], tap)
            dgrad[seen] += torch.einsum("ngkhw,gkc->ngchw", g, tap)
            wgrad[..., r, s] = torch.einsum("ngkhw,ngchw->gkc", g, padded[seen])
    dgrad = dgrad.flatten(1, 2)[..., high : high + a.shape[2], wide : wide + a.shape[3]]
    return {"fprop": fprop.flatten(1, 2), "dgrad": dgrad, "wgrad": wgrad.flatten(0, 1)}


def computed(case: Case, route: str, a, w, g) -> dict[str, torch.Tensor]:
    """What the layer's op makes of them: in int8 times a scale, in floating point as it is."""
    op, scale = case.op, torch.tensor(0.0137)
    if route == "floating point":
        a, w, g = a.float(), w.float(), g.float()
        return {"fprop": op.fprop(a, w), "dgrad": op.dgrad(g, w, a.shape, exact=True), "wgrad": op.wgrad(g, a, w.shape)}
    assert all(op.int8_pays(w.shape))
    yes = torch.tensor(True)
    return {
        "fprop": op.int8_fprop(a, w, scale, case.dtype, torch.tensor(case.signed)),
        "dgrad": op.int8_dgrad(g, w, scale, case.dtype, yes, a.shape),
        "wgrad": op.int8_wgrad([g, g] if case.seed % 2 else [g], a, w.shape),
    }


@dataclass
class Tally:
    """By (unit, kind of layer): shapes, GEMMs and wrong ones; and the cases with a wrong one."""

    shapes: Counter = field(default_factory=Counter)
    gemms: Counter = field(default_factory=Counter)
    wrong: Counter = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def table(self) -> str:
        lines = ["| unit | layer | shapes | GEMMs | wrong |", "|---|---|---|---|---|"]
        for unit, kind in sorted(self.shapes):
            key = unit, kind
            lines.append(f"| {unit} | {kind} | {self.shapes[key]} | {self.gemms[key]} | {self.wrong[key]} |")
        for proofs in (int8_library.proven_direct, int8_products.proven):
            verdicts = list(proofs.verdicts.values())
            lines.append(f"{proofs.unit}: not taken for {verdicts.count(False)} of {len(verdicts)} kinds of work")
        return "\n".join(lines)


def _spied(used: list, function, *arguments):
    used.append(function(*arguments))
    return used[-1]


def _suits_winograd(case: Case) -> bool:
    if isinstance(case.op, LinearOp):
        return False
    geometry = case.w[2:], case.op.stride, case.op.padding, case.op.dilation
    return int8_winograd.suits(geometry, case.a[1], case.g[1], int8_winograd.FEWEST_PRODUCTS)


def compare(case: Case, tally: Tally) -> None:
    """Count each GEMM of the case, on each route that serves it."""
    operands = case.operands()
    expected = exact(case, *operands)
    grouped, units = getattr(case.op, "groups", 1) > 1, set()
    blocks = [int8.BLOCKS] if all(case.op.int8_pays(case.w)) else []
    for route in (*blocks, "floating point") if grouped else ROUTES:
        if route == int8.WINOGRAD and not _suits_winograd(case):
            continue
        used, tiled, seen = [], {}, []
        spy = partial(_spied, used, int8_library._conv_directly)

        def taken(gemm, x, geometry, groups, rest, ours, library, route=route, tiled=tiled, seen=seen):
            if route not in ours:
                return library()
            name = "dgrad" if seen and gemm == "fprop" else gemm  # that of a stride of 1 is a convolution
            seen.append(name)
            result = ours[route]()
            if result is None:
                return library()
            tiled[name] = route
            return result

        with (
            mock.patch.object(int8, "_by_the_fastest", taken),
            mock.patch.object(int8_winograd, "FEWEST_PRODUCTS", 1),
            mock.patch.object(int8_library, "_conv_directly", spy),
            mock.patch.object(int8_library, "prefers_direct", lambda *_, route=route: route == "direct"),
        ):
            found = computed(case, route, *operands)
        direct = iter(used)  # of fprop, and of dgrad where that is a convolution
        for name, value in found.items():
            whole, unit = expected[name], route
            if route == "floating point":
                if whole.abs().max() >= EXACT_FLOATS:
                    continue
                right = whole.float()
            elif name == "wgrad":
                unit, right = "patches", (whole * (1 + case.seed % 2)).float()
            else:
                convolved = int8_library.has_direct_conv() and (
                    name == "fprop" or getattr(case.op, "stride", (1, 1)) == (1, 1)
                )
                unit = "oneDNN's convolution" if route == "direct" and convolved and next(direct) else "patches"
                right = (whole.float() * torch.tensor(0.0137)).to(case.dtype)
            unit = "float64" if grouped and route == int8.BLOCKS else unit  # what does not suit the blocks
            key = tiled.get(name, unit), case.kind
            units.add(key)
            tally.gemms[key] += 1
            if value.dtype != right.dtype or not torch.equal(value, right):
                tally.wrong[key] += 1
                tally.failures.append(f"{name} by {key[0]}: {case}")
    tally.shapes.update(units)
