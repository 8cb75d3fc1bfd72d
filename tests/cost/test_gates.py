"""Gates: cells by hand, and both blocks from the same prices."""

import pytest

from luqrun.cost import gates

GATES = gates.PRICES["gates"]


def test_cells_of_parts_by_hand():
    assert gates.adder(4) == {"half adder": 1, "full adder": 3}
    # 3 x 3: nine partial products; two rows of adders, of which each begins and the last one ends with a half adder.
    assert gates.array_multiplier(3) == {"and": 9, "half adder": 3, "full adder": 3}
    assert gates.array_multiplier(2) == {"and": 4, "half adder": 2, "full adder": 0}
    assert gates.mux(4, 3) == {"mux bit": 9}
    assert gates.shifter(27, 5) == {"mux bit": 135}
    # Of 8 bits: four pairs, two of these with a count of one bit to choose, and one with a count of two.
    assert gates.leading_zeros(3) == {"or": 7, "mux bit": 2 * 1 + 1 * 2}


def test_prices_of_adders_follow_from_those_of_their_gates():
    for name in ("gates", "nand"):
        assert set(gates.PRICES[name]) == set(GATES)
    assert GATES["full adder"] == 2 * GATES["xor"] + 2 * GATES["and"] + GATES["or"]
    assert GATES["half adder"] == GATES["xor"] + GATES["and"]
    assert GATES["mux bit"] == 2 * GATES["and"] + GATES["or"]


def test_the_blocks_by_hand():
    # transform 4 + 4 bits of multiplexers, 2 half adders and 1 full adder, XOR, zero: 4 OR and 1 + 7 AND
    assert gates.total("multiplication-free", GATES) == 8 * 3 + 2 * 2 + 5 + 1 + 4 + 8 == 46
    casts, multiplier, exponents = (8 + 4) * 3, 9 + 3 * 2 + 3 * 5, (2 + 3 * 5) + (2 + 4 * 5)
    normalised, rounded = 4 * 3 + 5 * 2, 1 + 3 + 3 * 2 + 2 * 3 + 5 * 2
    assert gates.total("standard", GATES) == casts + multiplier + exponents + 1 + normalised + rounded + 12 == 166


@pytest.mark.parametrize("prices", gates.PRICES)
def test_what_is_compared(prices):
    price = gates.PRICES[prices]
    found = gates.comparison(price)
    assert found["ratio"] == gates.total("standard", price) / gates.total("multiplication-free", price)
    assert 3 < found["ratio"] < gates.PAPER_RATIO  # our count says less than the paper
    assert 0 < found["MAC with FP32"] < found["MAC with FP16"] < 1
    saved = gates.total("standard", price) - gates.total("multiplication-free", price)
    whole = gates.total("standard", price) + gates.total("FP16 accumulator", price)
    assert found["MAC with FP16"] == pytest.approx(saved / whole)


def test_no_block_without_multiplications_multiplies():
    for name in ("multiplication-free", "multiplication-free, unsigned"):
        assert not [part for part in gates.BLOCKS[name] if "multiplier" in part.what]
    assert [part for part in gates.BLOCKS["standard"] if "multiplier" in part.what]
