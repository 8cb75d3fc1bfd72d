"""Tensors of each kind that kernels meet, and exact comparison, for the tests of the kernels."""

from itertools import product

import torch

from luqrun.quant.encoding import Encoding
from luqrun.quant.formats import FORMATS, Format
from luqrun.quant.kernels import has_kernels

LAST = torch.channels_last
COMPILED = [form for form in FORMATS.values() if has_kernels(form)]  # others have torch's operations alone
INT_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def encoding(form: Format, rounding: str, underflow: str | None = None) -> Encoding:
    """Of what kernels read; underflow is left out where the format has none."""
    return Encoding(form.name, rounding=rounding, underflow=underflow if form.logarithmic else None)


def normal(*shape, seed=1):
    """Random numbers of many magnitudes."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g) * torch.rand(shape, generator=g) ** 4


def tensors() -> dict[str, torch.Tensor]:
    """Name -> a tensor of each kind."""
    odd = normal(301)
    odd[::7], odd[3], odd[5], odd[6] = 0.0, float("nan"), float("inf"), -float("inf")
    odd[8] = -0.0
    finite = odd.nan_to_num(1.0, 2.0, -2.0)
    return {
        "vector": normal(1031),
        "unsigned": normal(257).abs(),
        "negative": -normal(70).abs(),
        "aligned": normal(2, 5, 4, 6).to(memory_format=LAST),
        "unaligned": normal(3, 5, 3, 7).to(memory_format=LAST),
        "odd image": normal(3, 5, 3, 5).to(memory_format=LAST),
        "pixel": normal(3, 7, 1, 1).to(memory_format=LAST),
        "one channel": normal(2, 1, 3, 3).to(memory_format=LAST),
        "many channels": normal(2, 1100, 2, 2).to(memory_format=LAST),
        "large images": normal(2, 3, 24, 30).to(memory_format=LAST),
        "image of many": normal(4, 3, 6, 6).to(memory_format=LAST)[1:3],
        "cropped": normal(2, 3, 6, 6).to(memory_format=LAST)[:, :, 1:, :5],
        "fewer channels": normal(2, 6, 4, 4).to(memory_format=LAST)[:, :3],
        "contiguous image": normal(2, 3, 4, 4),
        "slice": normal(40, 9)[:, ::2],
        "offset": normal(131)[3:],
        "transposed": normal(31, 17).t(),
        "expanded": normal(5, 1).expand(5, 6),
        "permuted": normal(2, 3, 4, 5, 2).permute(4, 0, 3, 1, 2),
        "one": normal(1),
        "scalar": normal(1)[0],
        "empty": normal(0),
        "empty images": normal(0, 3, 4, 4).to(memory_format=LAST),
        "zeros": torch.zeros(13),
        "half": normal(55).half(),
        "half image": normal(2, 3, 4, 5).half().to(memory_format=LAST),
        "bfloat16": normal(1031).bfloat16(),
        "bfloat16 offset": normal(64).bfloat16()[1:],
        "bfloat16 image": normal(2, 3, 5, 5).bfloat16().to(memory_format=LAST),
        "bfloat16 aligned": normal(2, 3, 4, 5).bfloat16().to(memory_format=LAST),
        "bfloat16 non-finite": odd.bfloat16(),
        "double": normal(55).double(),
        "double image": normal(2, 3, 4, 5).double().to(memory_format=LAST),
        "subnormal": normal(99) * 2.0**-140,
        "smallest": torch.tensor([2.0**-149, -(2.0**-149), 0.0, -0.0]),
        "huge": normal(99) / normal(99).abs().max() * 3e38,
        "wide": finite * 2.0 ** (30 * normal(301, seed=2).clamp(-2, 2)),
        "non-finite": odd,
        "nan": torch.tensor([1.0, torch.nan, -2.0, 0.5]),
        "negative nan": torch.tensor([1.0, -torch.nan, 0.5]),
        "infinite": torch.tensor([1.0, -torch.inf, -2.0, 0.5]),
    }


def modes(form):
    """All (rounding, underflow) of a format."""
    return list(product(("nearest", "stochastic"), ("flush", "nearest", "stochastic") if form.logarithmic else (None,)))


def bits_of(x: torch.Tensor) -> torch.Tensor:
    """The bit pattern, which tells +0 from -0; the same for every NaN."""
    x = x.masked_fill(x.isnan(), torch.nan) if x.is_floating_point() else x
    return x.view(INT_OF_SIZE[x.dtype.itemsize])


def _strides(x: torch.Tensor) -> list[int]:
    return [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]


def assert_identical(found: torch.Tensor, expected: torch.Tensor, what: object = ""):
    """The same dtype, shape, memory format and bits; NaN equals NaN."""
    assert found.dtype == expected.dtype, what
    assert found.shape == expected.shape, what
    assert not found.numel() or _strides(found) == _strides(expected), what
    assert torch.equal(bits_of(found), bits_of(expected)), what


def assert_all_identical(found, expected, what: object = ""):
    """Each as its counterpart; None where that is."""
    for one, other in zip(found, expected, strict=True):
        if other is None:
            assert one is None, what
        else:
            assert_identical(one, other, what)
