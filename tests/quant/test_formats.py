import pytest
import torch

from luqrun.errors import UserError
from luqrun.quant.formats import FORMATS, get_format, pack, unpack

ALL = list(FORMATS.values())
by_name = pytest.mark.parametrize("form", ALL, ids=lambda form: form.name)


@pytest.mark.parametrize(
    ("name", "signed", "levels"),
    [
        ("int4", True, list(range(-7, 8))),
        ("int4", False, list(range(16))),
        ("int2", True, [-1, 0, 1]),
        ("e1m0", True, [-1, 0, 1]),
        ("e2m0", True, [-4, -2, -1, 0, 1, 2, 4]),
        ("e3m0", True, [-64, -32, -16, -8, -4, -2, -1, 0, 1, 2, 4, 8, 16, 32, 64]),
        ("e3m0_radix4", True, [-4096, -1024, -256, -64, -16, -4, -1, 0, 1, 4, 16, 64, 256, 1024, 4096]),
        ("e3m0_div128", True, [-(2**e) for e in range(7, -1, -1)] + [0] + [2**e for e in range(8)]),
    ],
)
def test_levels(name, signed, levels):
    assert get_format(name).levels(signed) == levels


def test_every_width_is_there():
    assert set(FORMATS) >= {f"int{bits}" for bits in range(2, 9)} | {f"e{bits}m0" for bits in range(1, 5)}


@by_name
@pytest.mark.parametrize("signed", [True, False])
def test_at_most_2_to_the_bits_codes_and_they_fit_the_dtype(form, signed):
    levels = form.levels(signed)
    assert len(set(levels)) == len(levels) <= 2**form.bits
    assert levels == sorted(levels)
    assert torch.tensor(levels).to(form.code_dtype).tolist() == levels


def test_four_bit_codes_are_int8():
    assert all(form.code_dtype == torch.int8 for form in ALL if form.bits <= 4 and form.radix == 2)


@by_name
@pytest.mark.parametrize("signed", [True, False])
def test_fields_round_trip(form, signed):
    codes = torch.tensor(form.levels(signed), dtype=form.code_dtype)
    fields = form.to_fields(codes)
    assert len(fields.unique()) == len(codes)
    assert fields.min() >= 0
    assert fields.max() < 2**form.bits
    back = form.from_fields(fields, torch.tensor(signed))
    assert back.dtype == form.code_dtype
    assert torch.equal(back, codes)
    assert form.to_fields(torch.zeros(2, 3, dtype=form.code_dtype)).tolist() == [[0] * 3] * 2


@pytest.mark.parametrize("bits", range(2, 9))
def test_pack_round_trip_at_any_length(bits):
    for numel in (0, 1, 2, 3, 5, 7, 8, 9, 33):
        fields = torch.randint(0, 2**bits, (numel,), dtype=torch.int32)
        packed = pack(fields, bits)
        assert packed.dtype == torch.uint8
        assert packed.shape == ((numel * bits + 7) // 8,)
        assert torch.equal(unpack(packed, bits, numel), fields)


@by_name
def test_codes_survive_packing(form):
    codes = torch.tensor(form.levels(True), dtype=form.code_dtype)
    codes = codes[torch.randint(len(codes), (7, 3))]
    packed = pack(form.to_fields(codes), form.bits)
    back = form.from_fields(unpack(packed, form.bits, codes.numel()), torch.tensor(True))
    assert torch.equal(back.view(7, 3), codes)


@pytest.mark.parametrize(
    ("name", "codes", "packed"),
    [
        # Two's complement; the even element of a pair is the low half of its byte, the last byte is padded with 0.
        ("int4", [1, -1, 7, -7, 5], [0xF1, 0x97, 0x05]),
        ("int4", [15, 0, 8, 9], [0x0F, 0x98]),
        # Sign bit, then the exponent + 1 (0 is zero): 64 is 7, -64 is 15.
        ("e3m0", [0, 1, -1, 64, -64, 2], [0x10, 0x79, 0x2F]),
        ("e1m0", [0, 1, -1, 1], [0b01_11_01_00]),
    ],
)
def test_known_bytes(name, codes, packed):
    form = get_format(name)
    assert pack(form.to_fields(torch.tensor(codes)), form.bits).tolist() == packed


def test_unknown_format_names_key_and_choices():
    with pytest.raises(UserError, match=r"quant\.weight\.format=int9.*int4.*e3m0"):
        get_format("int9", "quant.weight.format")
