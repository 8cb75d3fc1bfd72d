"""How many gates a multiplier of INT4 and FP4 [1,3,0] takes: the standard block and the one without multiplications.

The standard block casts both operands to one floating-point type, multiplies, normalises and rounds; the other one is
luqrun.quant.kernels.mfbprop in gates. This is our own count, from cells that are written out below and two stated
prices of a cell. It is a count of logic: no wires, registers, timing or synthesis. The paper's claim stands beside it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

# Prices of cells. gates: two-input gates, as in textbooks (a full adder is 2 XOR, 2 AND and 1 OR; a bit of a 2:1
# multiplexer 2 AND and 1 OR; inverters are free). nand: two-input NANDs when a cell is made of nothing else.
PRICES = {
    "gates": {"and": 1, "or": 1, "xor": 1, "mux bit": 3, "half adder": 2, "full adder": 5},
    "nand": {"and": 2, "or": 3, "xor": 4, "mux bit": 4, "half adder": 5, "full adder": 9},
}
PAPER_RATIO = 5  # "about 5 times" smaller than the standard block: LUQ's text, section 7


@dataclass(frozen=True)
class Part:
    """Something that a block does, and its cells."""

    what: str
    cells: Mapping[str, int]


def adder(bits: int) -> dict[str, int]:
    """Ripple-carry, of two numbers, without a carry in."""
    return {"half adder": 1, "full adder": bits - 1}


def incrementer(bits: int) -> dict[str, int]:
    """Adds a carry."""
    return {"half adder": bits}


def mux(ways: int, bits: int) -> dict[str, int]:
    """One of `ways` numbers, as a chain of 2:1 multiplexers."""
    return {"mux bit": (ways - 1) * bits}


def shifter(bits: int, stages: int) -> dict[str, int]:
    """A barrel shifter by up to 2^stages - 1 places."""
    return {"mux bit": bits * stages}


def array_multiplier(bits: int) -> dict[str, int]:
    """Two unsigned numbers of `bits` (at least 2): the partial products, and the rows that add them."""
    return {"and": bits**2, "half adder": bits, "full adder": bits * (bits - 2)}


def leading_zeros(stages: int) -> dict[str, int]:
    """Counts those of 2^stages bits in a tree: a node ORs its halves, and chooses between their counts."""
    nodes = [2 ** (stages - level) for level in range(1, stages + 1)]
    return {"or": sum(nodes), "mux bit": sum(count * level for level, count in enumerate(nodes))}


def standard(fraction: int) -> tuple[Part, ...]:
    """Cast both to [1, 4, fraction], multiply, normalise, round. The integer comes as a sign and a magnitude of
    fraction + 1 bits."""
    mantissa = fraction + 1
    return (
        Part("cast INT4: exponent, by the leading one", mux(mantissa, 4)),
        Part("cast INT4: mantissa, shifted to the leading one", mux(mantissa, fraction)),
        Part("cast FP4: wires alone", {}),
        Part("mantissa multiplier", array_multiplier(mantissa)),
        Part("exponent adder", adder(4)),
        Part("exponent: less the bias", adder(5)),
        Part("sign", {"xor": 1}),
        Part("normalise: mantissa by one place", mux(2, mantissa + 1)),
        Part("normalise: exponent", incrementer(5)),
        Part("round: guard and sticky bits", {"and": 1, "or": mantissa}),
        Part("round: mantissa", incrementer(mantissa)),
        Part("round: mantissa by one place, exponent", _sum(mux(2, fraction), incrementer(5))),
        *_zero(fraction),
    )


def multiplication_free(fraction: int) -> tuple[Part, ...]:
    """The transform, an addition and an XOR; the product is a [1, 4, fraction] as it is."""
    mantissa = fraction + 1
    return (
        Part("transform INT4: power, by the leading one", mux(mantissa, 2)),
        Part("transform INT4: fraction, shifted to the leading one", mux(mantissa, fraction)),
        # Three bits and two: the carry goes through the third, and is the fourth.
        Part("exponent adder", {"half adder": 2, "full adder": 1}),
        Part("sign", {"xor": 1}),
        *_zero(fraction),
    )


def accumulator(mantissa: int, exponent: int, stages: int) -> tuple[Part, ...]:
    """A floating-point adder, of a product and the sum so far: mantissa bits, the hidden one included, and three to
    round by; stages of the shifters. Not the register."""
    wide = mantissa + 3
    return (
        Part("compare exponents", adder(exponent)),
        Part("swap operands, choose the exponent", mux(2, 2 * mantissa + exponent)),
        Part("align", shifter(wide, stages)),
        Part("add or subtract", _sum(adder(wide), {"xor": wide})),
        Part("count leading zeros", leading_zeros(stages)),
        Part("normalise: mantissa", shifter(wide, stages)),
        Part("normalise: exponent", adder(exponent)),
        Part("round", _sum(incrementer(mantissa), incrementer(exponent), {"and": 1, "or": 2})),
        Part("sign", {"xor": 1, "mux bit": 1}),
    )


def _zero(fraction: int) -> tuple[Part, ...]:
    """Both blocks alike: an operand of zero clears the product."""
    return (
        Part("find a zero in either operand", {"or": fraction + 2, "and": 1}),
        Part("clear the product", {"and": 1 + 4 + fraction}),
    )


def _sum(*cells: Mapping[str, int]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for each in cells:
        total.update(each)
    return dict(total)


OF_ZERO = _zero(2)  # parts of both blocks
BLOCKS = {
    "standard": standard(2),
    "multiplication-free": multiplication_free(2),
    "standard, unsigned": standard(3),
    "multiplication-free, unsigned": multiplication_free(3),
    "FP32 accumulator": accumulator(24, 8, 5),
    "FP16 accumulator": accumulator(11, 5, 4),
}


def price(cells: Mapping[str, int], prices: Mapping[str, int]) -> int:
    """What cells cost."""
    return sum(prices[cell] * count for cell, count in cells.items())


def total(block: str, prices: Mapping[str, int]) -> int:
    """What a block of BLOCKS costs."""
    return sum(price(part.cells, prices) for part in BLOCKS[block])


def comparison(prices: Mapping[str, int]) -> dict[str, float]:
    """How many times larger the standard block is, and by which share a whole multiply-accumulate shrinks."""
    both = total("standard", prices), total("multiplication-free", prices)
    found = {"ratio": both[0] / both[1]}
    for name in ("FP32", "FP16"):
        beside = total(f"{name} accumulator", prices)
        found[f"MAC with {name}"] = 1 - (both[1] + beside) / (both[0] + beside)
    unsigned = [total(f"{name}, unsigned", prices) for name in ("standard", "multiplication-free")]
    return {**found, "ratio, unsigned": unsigned[0] / unsigned[1]}
