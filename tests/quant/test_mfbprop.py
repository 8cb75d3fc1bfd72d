"""Multiplication without multiplications: every pair of operands, and GEMMs bit for bit."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from luqrun.quant.formats import get_format
from luqrun.quant.kernels import mfbprop

INT4, E3M0 = get_format("int4"), get_format("e3m0")
FIELDS = torch.arange(16)
SIGNED = torch.tensor(True)
# What multiplies, in torch.
MULTIPLY = ("mul", "mm", "bmm", "addmm", "baddbmm", "matmul", "dot", "mv", "addcmul", "einsum", "convolution", "pow")


class NoMultiplication(TorchDispatchMode):
    """Refuses every operation that multiplies."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator.overloadpacket.__name__.rstrip("_")
        assert name not in MULTIPLY, f"{operator} multiplies"
        return operator(*args, **(kwargs or {}))


def test_all_256_pairs_of_fields_give_the_integer_product():
    fields = mfbprop.products(FIELDS[:, None], FIELDS[None], signed=True)
    integers, logarithms = INT4.from_fields(FIELDS, SIGNED).int(), E3M0.from_fields(FIELDS, SIGNED).int()
    exact = integers[:, None] * logarithms[None]
    assert fields.numel() == 256
    assert int(fields.max()) < 2**7  # FP7 [1,4,2]: no rounding
    assert torch.equal(mfbprop.values(True)[fields.long()], exact)
    codes = exact[[code != 8 for code in range(16)]]  # without -8, which is no code of ours
    assert int(codes.abs().max()) == 7 * 64
    assert len(codes[codes > 0].unique()) == 31


def test_all_240_pairs_of_unsigned_integers_and_codes():
    codes = torch.tensor(E3M0.levels())
    fields = mfbprop.products(FIELDS[:, None], E3M0.to_fields(codes)[None], signed=False)
    assert fields.numel() == 240
    assert int(fields.max()) < 2**8  # [1,4,3]
    exact = FIELDS[:, None].int() * codes[None].int()
    assert torch.equal(mfbprop.values(False)[fields.long()], exact)
    # The paper's FP7 has two fraction bits: values of at most three bits from the first to the last.
    magnitudes = exact[exact > 0].unique().tolist()
    wide = [each for each in magnitudes if each // (each & -each) >= 8]
    assert (len(magnitudes), len(wide)) == (63, 28)
    assert {each // (each & -each) for each in wide} == {9, 11, 13, 15}


def test_the_transform_is_the_one_of_the_paper():
    sign, power, fraction = (table.tolist() for table in mfbprop.transform(True))
    pairs = {1: (0, 0b00), 2: (1, 0b00), 3: (1, 0b10), 4: (2, 0b00), 5: (2, 0b01), 6: (2, 0b10), 7: (2, 0b11)}
    for magnitude, pair in pairs.items():
        for field, of in ((magnitude, 0), (16 - magnitude, 1)):
            assert (sign[field], (power[field], fraction[field])) == (of, pair)
    assert power[0] == mfbprop.ZERO


def test_zero_has_one_field_whatever_its_sign():
    zeros = mfbprop.products(torch.tensor([0, 9, 0]), torch.tensor([8 + 5, 8, 8]), signed=True)
    assert zeros.tolist() == [0, 0, 0]


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 7, 3), (2, 700, 4), (3, 0, 2), (0, 4, 2)])
def test_a_gemm_without_multiplications_is_the_integer_gemm(shape, signed, monkeypatch):
    monkeypatch.setattr(mfbprop, "CHUNK", 100)  # several parts of a sum
    rows, inner, columns = shape
    generator = torch.Generator().manual_seed(3)
    levels = torch.tensor(INT4.levels(signed)), torch.tensor(E3M0.levels())
    first = levels[0][torch.randint(len(levels[0]), (rows, inner), generator=generator)].to(torch.int8)
    second = levels[1][torch.randint(len(levels[1]), (inner, columns), generator=generator)].to(torch.int8)
    mfbprop.gemm(first[:, :1], second[:1], signed)  # makes the tables
    with NoMultiplication():
        found = mfbprop.gemm(first, second, signed)
    assert found.dtype == torch.int64
    assert torch.equal(found, first.long() @ second.long())


def test_sums_beyond_what_float32_holds_are_exact():
    first, second = torch.full((1, 40_001), 7), torch.full((40_001, 1), 64)
    second[-1] = 1
    assert mfbprop.gemm(first, second, True).item() == 40_000 * 448 + 7 > 2**24


def test_the_guard_of_these_tests_sees_a_multiplication():
    with pytest.raises(AssertionError, match="multiplies"), NoMultiplication():
        torch.ones(2) * 3
