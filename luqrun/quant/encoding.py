"""How a tensor becomes codes and scales: format, range, rounding and blocks, as one value that every kernel takes."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields

from luqrun.errors import UserError, check_choice
from luqrun.quant.formats import SAWB, XI, Format, get_format
from luqrun.quant.scale_formats import SCALE_FORMATS, SCALE_ROUNDINGS, exponent_rule

RANGES = ("absmax", "sawb", "hindsight", "rms", "signed_max")
ROUNDINGS = ("nearest", "stochastic", "stochastic_log")
UNDERFLOWS = ("flush", "nearest", "stochastic")
ERRORS = ("mse", "mae")  # by which four over six chooses
OF_BLOCKS = ("scale_format", "scale_rounding", "four_over_six", "eden")  # keys that need a block


@dataclass(frozen=True, eq=False)
class Encoding:
    """The numbers that one quantization gives, but for its draw.

    format: see luqrun.quant.formats. range: absmax (the largest code is max|x|, Eq. 11), sawb (integer formats),
    hindsight (Eq. 18), signed_max (max x, as the paper's own code has it), or for blocks rms (2.92247856 times the root
    of the mean square: QuEST, in Quartet). rounding: nearest, stochastic, or of e3m0_xi stochastic_log (in the
    logarithm, as the code of Xi et al. 2023 has it: biased). underflow, below the smallest power of two of a
    logarithmic format: flush, nearest or stochastic (default: as `rounding`; None for other formats). pow2_scale: the
    scale is rounded up to a power of two (A.7). largest: the value on which the range ends (None: the largest there
    is); in a logarithmic format a code, and with one beyond the largest the scale is finer and the top of the range is
    clipped.

    block: how many elements along the contraction share a scale, or [a, b], a tile of two axes; None: one scale for
    the tensor. scale_format: of the blocks' scales, e8m0 (powers of two), e4m3 with a float32 scale of the tensor on
    top, or fp32. scale_rounding: of e8m0's exponent, floor, rceil, ceil, even or down (scale_formats.exponent_rule).
    four_over_six: mse or mae, by which error a block's maximum lands on `largest` or on two thirds of it (Cook et al.,
    2025). headroom: what elements are multiplied by once their scale is known, and the values divided by (3/4: Tseng et
    al., 2025). eden: the block's scale is corrected to leave no bias along the block, and rounded stochastically
    (MS-EDEN, in Quartet II).

    Raises UserError for what does not go together. `key` is all of it as text, which torch's operators can take;
    `Encoding.of` is the inverse. form: the Format. sawb: the two coefficients of the range (formats.SAWB), or zeros.
    has_tensor_scale: whether blocks have a scale of the whole tensor beside their own.
    """

    format: str
    range: str = "absmax"
    rounding: str = "nearest"
    underflow: str | None = None
    pow2_scale: bool = False
    largest: int | float | None = None
    block: int | tuple[int, int] | None = None
    scale_format: str | None = None
    scale_rounding: str | None = None
    four_over_six: str | None = None
    headroom: float = 1.0
    eden: bool = False

    def __post_init__(self):
        check_choice("range", self.range, RANGES)
        check_choice("rounding", self.rounding, ROUNDINGS)
        form = get_format(self.format)
        if self.rounding == "stochastic_log" and form.name != XI:
            raise UserError(f"rounding=stochastic_log is for format={XI}; with format={form.name}, use stochastic")
        if self.underflow is None:
            if form.logarithmic:
                default = "nearest" if self.rounding == "nearest" else "stochastic"
                object.__setattr__(self, "underflow", default)
        elif not form.logarithmic:
            raise UserError(
                f"underflow={self.underflow} is for logarithmic formats; with format={form.name}, set it to null"
            )
        else:
            check_choice("underflow", self.underflow, UNDERFLOWS)
        if self.rounding == "stochastic_log" and self.underflow != "stochastic":
            raise UserError(f"underflow={self.underflow} does not go with rounding=stochastic_log; allowed: stochastic")
        if self.range == "sawb" and (form.logarithmic or form.mantissa_bits or form.bits not in SAWB):
            allowed = ", ".join(f"int{bits}" for bits in SAWB)
            raise UserError(f"range=sawb has no coefficients for format={form.name}; allowed formats: {allowed}")
        if self.largest is not None:
            self._check_largest(form)
        if not 0 < self.headroom <= 1:
            raise UserError(f"headroom={self.headroom} is out of range; allowed: 0 < headroom <= 1")
        object.__setattr__(self, "headroom", float(self.headroom))
        if self.block is None:
            self._check_whole()
        else:
            self._check_blocks(form)
        # Not fields: what the kernels read in each call.
        object.__setattr__(self, "form", form)
        object.__setattr__(self, "sawb", SAWB[form.bits] if self.range == "sawb" else (0.0, 0.0))
        # A compiler for any size makes symbols of numbers that it sees compared: here it sees a bool.
        beside = self.block is not None and (self.scale_format == "e4m3" or self.headroom != 1)
        object.__setattr__(self, "has_tensor_scale", beside)
        object.__setattr__(self, "key", json.dumps([getattr(self, each.name) for each in fields(self)]))
        _known[self.key] = self

    def _check_largest(self, form: Format) -> None:
        if not form.logarithmic and not form.mantissa_bits:
            raise UserError(
                f"largest={self.largest} is for logarithmic formats and floating-point ones; with format={form.name}, "
                "set it to null"
            )
        if form.logarithmic:
            least, limit, most = 1, form.limit, form.limit * form.radix
        else:
            limit = form.limit * form.unit
            least, most = limit / 2, limit * 2
        if not least <= self.largest <= most or (form.logarithmic and self.largest != int(self.largest)):
            raise UserError(
                f"largest={self.largest} is out of range; allowed with format={form.name}: {least:g} to {most:g}"
            )
        object.__setattr__(self, "largest", int(self.largest) if form.logarithmic else float(self.largest))
        if self.largest > limit and "stochastic" in (self.rounding, self.underflow):
            raise UserError(
                f"largest={self.largest} is beyond the largest code, {limit}: what is clipped would bias the "
                "draws; allowed with rounding and underflow without draws"
            )

    def _check_whole(self) -> None:
        """Raise UserError for keys that need blocks."""
        for key in OF_BLOCKS:
            if getattr(self, key):
                raise UserError(f"{key}={getattr(self, key)} is for blocks; set block too, such as block=32")
        if self.range == "rms":
            raise UserError("range=rms is for blocks; set block too, such as block=32, or use range=sawb or absmax")
        if self.headroom != 1:
            raise UserError(f"headroom={self.headroom} is for blocks; set block too, such as block=32")

    def _check_blocks(self, form: Format) -> None:
        object.__setattr__(self, "block", _checked_block(self.block))
        if self.range in ("sawb", "hindsight", "signed_max"):
            raise UserError(f"range={self.range} is of a whole tensor; allowed with block={self.block}: absmax, rms")
        if self.pow2_scale:
            raise UserError("pow2_scale is of a whole tensor's scale; with block, use scale_format=e8m0")
        if form.radix != 2 or form.name == XI:
            raise UserError(f"format={form.name} has no blocks; allowed with block={self.block}: e2m1, int4, e3m0, ...")
        scale_format = self.scale_format or "e8m0"
        check_choice("scale_format", scale_format, SCALE_FORMATS)
        object.__setattr__(self, "scale_format", scale_format)
        if scale_format == "e8m0":
            rounding = self.scale_rounding or "rceil"
            check_choice("scale_rounding", rounding, SCALE_ROUNDINGS)
            object.__setattr__(self, "scale_rounding", rounding)
        elif self.scale_rounding is not None:
            raise UserError(
                f"scale_rounding={self.scale_rounding} is for scale_format=e8m0; with {scale_format}, set it to null"
            )
        for key in ("four_over_six", "eden"):
            if getattr(self, key) and (scale_format != "e4m3" or not form.mantissa_bits):
                raise UserError(
                    f"{key} is for scale_format=e4m3 and a format such as e2m1, not {scale_format}, {form.name}"
                )
        if self.four_over_six is not None:
            check_choice("four_over_six", self.four_over_six, ERRORS)
        if self.eden and (self.rounding == "stochastic" or self.four_over_six):
            raise UserError(
                "eden goes with rounding=nearest and without four_over_six: its draws are those of the scales"
            )

    def __eq__(self, other: object) -> bool:
        # By one text, not by numbers: see has_tensor_scale.
        return isinstance(other, Encoding) and self.key == other.key

    def __hash__(self):
        return hash(self.key)  # which Python keeps with the text

    @property
    def is_stochastic(self) -> bool:
        return self.rounding != "nearest" or self.underflow == "stochastic" or self.eden

    @property
    def tile(self) -> tuple[int, int] | None:
        """The two sides of a tile; None for blocks along one axis, or none."""
        return self.block if isinstance(self.block, tuple) else None

    @property
    def top(self) -> float:
        """The value on which a block's range ends."""
        return float(self.largest or self.form.limit * self.form.unit)

    @property
    def scale_limit(self) -> float:
        """The largest e4m3 scale that a block gets: 448, or 256 where it may still grow (FACTS 2.5, 2.6)."""
        return 256.0 if self.four_over_six or self.eden else 448.0

    @property
    def exponent_rule(self) -> tuple[int, int]:
        """See scale_formats.exponent_rule."""
        return exponent_rule(self.scale_rounding or "rceil", self.top, self.form.mantissa_bits)

    @property
    def _highest(self) -> float:
        """What no block's maximum exceeds once it is divided by its e8m0 scale."""
        power = 2.0 ** (math.frexp(self.top)[1] - 1)
        return {
            "floor": 2 * power,
            "rceil": self.top,
            "ceil": power,
            "even": (2 - 2.0 ** -(self.form.mantissa_bits + 1)) * power,
            "down": 2 * self.top,
        }[self.scale_rounding]

    @property
    def biases(self) -> tuple[str, ...]:
        """Why the stochastic codes are biased by design; empty where they are not."""
        found = []
        if self.rounding == "stochastic_log":
            found.append("rounding=stochastic_log shrinks by about a tenth")
        if self.range == "signed_max" and self.is_stochastic:
            found.append("range=signed_max clips negative elements beyond the largest positive one")
        if self.block is None or not self.is_stochastic:
            return tuple(found)
        limit = self.form.limit * self.form.unit
        if self.range == "rms" and not self.eden:
            found.append("range=rms clips the top of a block")
        elif self.scale_format == "e8m0" and self._highest * self.headroom > limit:
            found.append(f"scale_rounding={self.scale_rounding} clips the top of a block")
        elif self.scale_format == "e4m3" and not self.eden and self.top * self.headroom > 16 / 17 * limit * 1.000001:
            found.append("an e4m3 scale that is rounded down clips the top of a block (largest: 16/17 of it does not)")
        if self.four_over_six:
            found.append("four_over_six chooses a scale by the data")
        return tuple(found)

    @staticmethod
    def of(key: str) -> Encoding:
        """The encoding with this key."""
        if key not in _known:  # it was made in another process
            values = json.loads(key)
            Encoding(*(tuple(value) if isinstance(value, list) else value for value in values))
        return _known[key]


def _checked_block(block: object) -> int | tuple[int, int]:
    sides = tuple(block) if isinstance(block, list | tuple) else (block,)
    if len(sides) > 2 or not sides or any(type(side) is not int or side < 1 for side in sides):
        raise UserError(f"block={block!r} must be a positive integer, or two for a tile, such as 32 or [16, 16]")
    return sides if len(sides) == 2 else sides[0]


_known: dict[str, Encoding] = {}  # by key; a dictionary, which torch.compile reads where it cannot call functools.cache
