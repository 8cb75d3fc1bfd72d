"""The matrix products (GEMMs) of a training step under a recipe: format of each operand, bits kept, bytes moved."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from luqrun.cost.products import ATTENTION, LAYER, UNKNOWN, Product
from luqrun.quant.quantizer import Quantizer
from luqrun.quant.recipe import OPERANDS_OF, Recipe

BITS = {"fp32": 32, "bf16": 16}  # of a number in high precision, by the `precision` of a run
SCALE_BITS = {"e8m0": 8, "e4m3": 8, "fp32": 32}
PRODUCTS_OF_ACTIVATIONS = "the recipe quantizes layers, not products of two activations"
# By GEMM, which of (first operand, second operand, result) of the forward's product are its operands and its result.
PLACES = {"fprop": (0, 1, 2), "dgrad": (2, 1, 0), "wgrad": (2, 0, 1)}


@dataclass(frozen=True)
class Side:
    """An operand of a GEMM. name: activation, weight or gradient; format: such as int4, or the run's precision; bits:
    an element takes, its share of a block's scale included; width: of its codes, None in high precision."""

    name: str
    format: str
    bits: float
    width: int | None


@dataclass(frozen=True)
class Gemm:
    """`passes` times `groups` products (rows, inner) x (inner, columns).

    kind: of the Product it belongs to. macs: of one pass; None where they are not known. width: 4 or 8, the units that
    take it, by its wider operand; None: high precision. kept_bits: what the forward keeps for it. moved_bits: operands
    read and the result written, once each. quantized_bits: read and written to make its operands' codes. why: it is in
    high precision, else "".
    """

    layer: str
    kind: str
    gemm: str
    groups: int
    rows: int
    inner: int
    columns: int
    macs: int | None
    sides: tuple[Side, Side]
    width: int | None
    passes: int = 1
    kept_bits: float = 0
    moved_bits: float = 0
    quantized_bits: float = 0
    why: str = ""


def gemms_of(
    products: Sequence[Product], recipe: Recipe, high: Mapping[str, str], precision: str = "fp32"
) -> list[Gemm]:
    """The GEMMs of a training step whose forward has these products, three a layer: those of fprop first.

    high: by name, the layers that the recipe leaves in high precision, and why. precision: what that is. A GEMM whose
    result nobody wants, such as dgrad of a first layer, is not there. Of an ATTENTION product dgrad is the gradient of
    its first operand, and wgrad that of its second.
    """
    return [gemm for part in _Counter(recipe, high, precision).run(products) for gemm in part]


class _Counter:
    def __init__(self, recipe: Recipe, high: Mapping[str, str], precision: str):
        self.recipe, self.high, self.precision = recipe, high, precision
        self.held: set = set()  # (source, its quantizers) that an earlier layer quantized or kept

    def run(self, products: Sequence[Product]) -> list[list[Gemm]]:
        return [self._of(product) for product in products]

    def _of(self, product: Product) -> list[Gemm]:
        wanted = ["fprop", *(["dgrad"] if product.wants[0] else []), *(["wgrad"] if product.wants[1] else [])]
        return [self._gemm(product, name) for name in wanted]

    def _gemm(self, product: Product, name: str) -> Gemm:
        why = self._why(product)
        pair = (None, None) if why else getattr(self.recipe, name).operands
        sides = tuple(self._side(operand, each) for operand, each in zip(OPERANDS_OF[name], pair, strict=True))
        if not why and any(side.width is None for side in sides):
            left = " and ".join(side.name for side in sides if side.width is None)
            why = f"the recipe leaves the {left} of {name} in high precision"
        width = None if why else (4 if max(side.width for side in sides) <= 4 else 8)
        passes = 1 if why or pair[0].samples == 1 else pair[0].samples  # of more draws each is a GEMM of its own
        first, second, result = (product.elements[place] for place in PLACES[name])
        moved = passes * (first * sides[0].bits + second * sides[1].bits) + result * BITS[self.precision]
        kept = self._kept(product, name, sides) + self._masked(product, name)
        quantized = self._quantized(product, name, pair)
        shape = {
            "fprop": (product.rows, product.inner, product.columns),
            "dgrad": (product.rows, product.columns, product.inner),
            "wgrad": (product.columns, product.rows, product.inner),
        }[name]
        about = product.layer, product.kind, name, product.groups, *shape, product.macs, sides, width
        return Gemm(*about, passes, kept, moved, quantized, why)

    def _why(self, product: Product) -> str:
        if product.kind == UNKNOWN:
            return f"unknown: {product.what}"
        if product.kind == ATTENTION:
            return PRODUCTS_OF_ACTIVATIONS
        # Attention as a whole is a layer with a projection inside it, which has its name and more.
        return self.high.get(product.layer) or self.high.get(product.layer.removesuffix(".in_proj")) or ""

    def _side(self, operand: str, quantizer: Quantizer | None) -> Side:
        if quantizer is None:
            return Side(operand, self.precision, BITS[self.precision], None)
        return Side(operand, quantizer.format, bits_of(quantizer), quantizer.form.bits)

    def _kept(self, product: Product, name: str, sides: tuple[Side, Side]) -> float:
        """Of wgrad the activation, of dgrad the weight's codes: a weight in high precision is there anyway. Of products
        of activations both."""
        if name == "fprop":
            return 0
        elements = product.elements[PLACES[name][1]]
        if name == "dgrad" and product.kind != ATTENTION:
            return 0 if sides[1].width is None else elements * sides[1].bits
        if name == "wgrad" and product.kind == LAYER and product.source >= 0:
            key = "kept", product.source, sides[1]
            if key in self.held:
                return 0
            self.held.add(key)
        return elements * sides[1].bits

    def _masked(self, product: Product, name: str) -> int:
        """Bits kept of what fprop clips of the operand whose gradient this GEMM computes (operands.Mask)."""
        fprop, operand = self.recipe.fprop, {"dgrad": "activation", "wgrad": "weight"}.get(name)
        clips = operand is not None and getattr(getattr(fprop, operand), "range", None) == "rms"
        if not clips or not fprop.trust_mask or self._why(product):
            return 0
        if operand == "activation" and product.source >= 0:
            key = "masked", product.source
            if key in self.held:
                return 0
            self.held.add(key)
        return product.elements[PLACES["fprop"][OPERANDS_OF["fprop"].index(operand)]]

    def _quantized(self, product: Product, name: str, pair: tuple) -> float:
        """Bits that are read and written to quantize what this GEMM is the first to take."""
        bits = 0.0
        for operand, quantizer, place in zip(OPERANDS_OF[name], pair, PLACES[name], strict=False):
            if quantizer is None:
                continue
            rotation = getattr(self.recipe, name).hadamard
            how = (name, quantizer.encoding) if rotation or not quantizer.lies_alike else quantizer.encoding
            of = product.source if operand == "activation" and product.source >= 0 else product
            fresh = ("quantized", of, operand, how) not in self.held
            self.held.add(("quantized", of, operand, how))
            draws = quantizer.samples - (not fresh)  # the first draw serves both GEMMs
            bits += product.elements[place] * (BITS[self.precision] * (draws > 0) + draws * bits_of(quantizer))
        return bits


def bits_of(quantizer: Quantizer) -> float:
    """Bits that a code takes where it lies in memory, with its share of a block's scale; short blocks not counted."""
    if quantizer.block is None:
        return quantizer.form.field_bits
    block = quantizer.block if isinstance(quantizer.block, int) else math.prod(quantizer.block)
    return quantizer.form.field_bits + SCALE_BITS[quantizer.scale_format] / block
