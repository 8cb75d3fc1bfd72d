"""How a tensor becomes codes and one scale: format, range and rounding, as one value that every kernel takes."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields

from luqrun.errors import UserError, check_choice
from luqrun.quant.formats import SAWB, Format, get_format

RANGES = ("absmax", "sawb", "hindsight")
ROUNDINGS = ("nearest", "stochastic")
UNDERFLOWS = ("flush", "nearest", "stochastic")


@dataclass(frozen=True)
class Encoding:
    """The numbers that one quantization gives, but for its draw.

    format: see luqrun.quant.formats. range: absmax (the largest code is max|x|, Eq. 11), sawb (integer formats) or
    hindsight (Eq. 18). rounding: nearest or stochastic. underflow, below the smallest power of two of a logarithmic
    format: flush, nearest or stochastic (default: as `rounding`; None for other formats). pow2_scale: the scale is
    rounded up to a power of two (A.7). largest, of a logarithmic format: the code on which the range ends (None: the
    largest there is; with one beyond it the scale is finer and the top of the range is clipped). Raises UserError for
    what does not go together.

    `key` is all of it as text, which torch's operators can take; `Encoding.of` is the inverse. form: the Format. sawb:
    the two coefficients of the range (formats.SAWB), or zeros.
    """

    format: str
    range: str = "absmax"
    rounding: str = "nearest"
    underflow: str | None = None
    pow2_scale: bool = False
    largest: int | None = None

    def __post_init__(self):
        check_choice("range", self.range, RANGES)
        check_choice("rounding", self.rounding, ROUNDINGS)
        form = get_format(self.format)
        if self.underflow is None:
            if form.logarithmic:
                object.__setattr__(self, "underflow", self.rounding)
        elif not form.logarithmic:
            raise UserError(f"underflow={self.underflow} is for logarithmic formats; with format={form.name}, omit it")
        else:
            check_choice("underflow", self.underflow, UNDERFLOWS)
        if self.range == "sawb" and (form.logarithmic or form.bits not in SAWB):
            allowed = ", ".join(f"int{bits}" for bits in SAWB)
            raise UserError(f"range=sawb has no coefficients for format={form.name}; allowed formats: {allowed}")
        if self.largest is not None:
            self._check_largest(form)
        # Not fields: what the kernels read in each call.
        object.__setattr__(self, "form", form)
        object.__setattr__(self, "sawb", SAWB[form.bits] if self.range == "sawb" else (0.0, 0.0))
        object.__setattr__(self, "key", json.dumps([getattr(self, each.name) for each in fields(self)]))
        _known[self.key] = self

    def _check_largest(self, form: Format) -> None:
        if not form.logarithmic:
            raise UserError(f"largest={self.largest} is for logarithmic formats; with format={form.name}, omit it")
        most = form.limit * form.radix
        if not 1 <= self.largest <= most:
            raise UserError(f"largest={self.largest} is out of range; allowed with format={form.name}: 1 to {most}")
        if self.largest > form.limit and self.is_stochastic:
            raise UserError(
                f"largest={self.largest} is beyond the largest code, {form.limit}: what is clipped would bias the "
                "draws; allowed with rounding and underflow without draws"
            )

    def __hash__(self):
        return hash(self.key)  # which Python keeps with the text

    @property
    def is_stochastic(self) -> bool:
        return "stochastic" in (self.rounding, self.underflow)

    @staticmethod
    def of(key: str) -> Encoding:
        """The encoding with this key."""
        if key not in _known:  # it was made in another process
            Encoding(*json.loads(key))
        return _known[key]


_known: dict[str, Encoding] = {}  # by key; a dictionary, which torch.compile reads where it cannot call functools.cache
