"""A recipe: a quantizer, or none, for each operand of a layer's three GEMMs, and the layers left alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

from luqrun.errors import UserError, check_choice
from luqrun.quant.encoding import Encoding
from luqrun.quant.quantizer import Quantizer, quantizer
from luqrun.quant.rotation import Rotation
from luqrun.quant.uses import uses_of

OPERANDS = ("weight", "activation", "gradient")
OF_GRADIENTS = ("samples", "samples_scope", "redraw_every")  # keys that other operands do not have
MAY_REQUANTIZE = ("quant.dgrad.weight", "quant.wgrad.activation")  # what the backward pass takes of fprop's operands
SAMPLES_SCOPES = ("wgrad", "both")
SKIP = ("first", "last", "shortcut")


OF_PAIR = property(lambda pair: pair[:2], doc="The quantizers of both operands.")  # a named tuple inherits nothing


class Fprop(NamedTuple):
    """The operands of the output, W a (Eq. 1). trust_mask: what a range=rms clips gets no gradient (QuEST)."""

    activation: Quantizer | None = None
    weight: Quantizer | None = None
    hadamard: Rotation | None = None
    trust_mask: bool = False
    operands = OF_PAIR


class Dgrad(NamedTuple):
    """The operands of the input's gradient, W g (Eq. 2)."""

    gradient: Quantizer | None = None
    weight: Quantizer | None = None
    hadamard: Rotation | None = None
    operands = OF_PAIR


class Wgrad(NamedTuple):
    """The operands of the weight's gradient, g a (Eq. 3). The samples of its gradient are those of SMP (5.1)."""

    gradient: Quantizer | None = None
    activation: Quantizer | None = None
    hadamard: Rotation | None = None
    operands = OF_PAIR


GEMMS = {"fprop": Fprop, "dgrad": Dgrad, "wgrad": Wgrad}
OPERANDS_OF = {gemm: pair._fields[:2] for gemm, pair in GEMMS.items()}
OF_ROTATIONS = ("hadamard", "signs")  # keys of a GEMM beside its operands
HIGH_PRECISION = Fprop(), Dgrad(), Wgrad()


@dataclass(frozen=True)
class Recipe:
    """The quantizers of the three GEMMs (None: high precision) and `skip`.

    skip: first, last, shortcut, or patterns (fnmatch) of module names, for the layers kept in high precision. Where two
    GEMMs take a tensor in the same encoding, it is quantized once. Raises UserError where the quantizers of an operand
    remember its range, or share draws between steps, in different ways: there is one memory and one name of a draw.
    """

    name: str
    fprop: Fprop = HIGH_PRECISION[0]
    dgrad: Dgrad = HIGH_PRECISION[1]
    wgrad: Wgrad = HIGH_PRECISION[2]
    skip: tuple[str, ...] = SKIP

    def __post_init__(self):
        for operand in OPERANDS:
            found = self.quantizers(operand)
            momenta = {each.hindsight_momentum for each in found if each.range == "hindsight"}
            drawn = {each.redraw_every for each in found if each.is_stochastic}
            for key, values in (("hindsight_momentum", momenta), ("redraw_every", drawn)):
                if len(values) > 1:
                    raise UserError(
                        f"quant.{operand}.{key} must be the same in all GEMMs of the {operand}, not {sorted(values)}"
                    )
        self._check_rotations()
        # No field: what each forward asks for.
        redraw_every = max((each.redraw_every for each in self.quantizers("gradient")), default=1)
        object.__setattr__(self, "redraw_every", redraw_every)
        object.__setattr__(self, "uses", uses_of(self.fprop, self.dgrad, self.wgrad))

    def _check_rotations(self) -> None:
        """Raise UserError for a range from earlier steps of what is rotated in one GEMM and not in another."""
        for gemm, operands in OPERANDS_OF.items():
            pair = getattr(self, gemm)
            for operand in operands if pair.hadamard is not None else ():
                found = getattr(pair, operand)
                if found is not None and found.range == "hindsight":
                    raise UserError(
                        f"quant.{gemm}.hadamard does not go with range=hindsight of its {operand}, which is of the "
                        "tensor before it; allowed: other ranges"
                    )

    @classmethod
    def of(
        cls,
        name: str,
        weight: Quantizer | None = None,
        activation: Quantizer | None = None,
        gradient: Quantizer | None = None,
        skip: tuple[str, ...] = SKIP,
        samples_scope: str = "wgrad",
    ) -> Recipe:
        """The recipe that quantizes an operand alike in all its GEMMs; only wgrad averages samples, or `both` do."""
        drawn_once = gradient is not None and samples_scope == "wgrad"
        first = replace(gradient, samples=1) if drawn_once else gradient
        return cls(name, Fprop(activation, weight), Dgrad(first, weight), Wgrad(gradient, activation), skip)

    @classmethod
    def from_config(cls, config) -> Recipe:
        """From the `quant` part of a run's config, a dataclass with the keys of `from_keys`."""
        return cls.from_keys(asdict(config))

    @classmethod
    def from_keys(cls, keys: Mapping) -> Recipe:
        """From the keys of conf/quant/*.yaml, as nested dicts; UserError names the key that is wrong.

        name, skip. weight, activation, gradient: the keys of a quantizer for all the operand's GEMMs, or None; of these
        `samples` is for wgrad alone, unless samples_scope=both. fprop, dgrad, wgrad: by operand, what differs in that
        GEMM: keys to change (None: unchanged), a whole quantizer where there is a `format`, or None: high precision;
        and hadamard and signs, a rotation of both operands (luqrun.quant.rotation), and fprop's trust_mask.
        """
        known = ("name", *OPERANDS, *GEMMS, "skip")
        for key in keys:
            if key not in known:
                raise UserError(f"quant.{key} is not a key; allowed: {', '.join(known)}")
        skip = keys.get("skip", SKIP)
        if not isinstance(skip, list | tuple) or not all(isinstance(entry, str) for entry in skip):
            raise UserError(f"quant.skip={skip!r} must be a list of names, such as [first, last, shortcut]")
        plain = {operand: _part(f"quant.{operand}", keys.get(operand)) for operand in OPERANDS}
        for operand, part in plain.items():
            if part is not None:
                scope = part.get("samples_scope", "wgrad")
                check_choice(f"quant.{operand}.samples_scope", scope, SAMPLES_SCOPES)
                _build(f"quant.{operand}", operand, part)
        gemms = {}
        for gemm, pair in GEMMS.items():
            changes = _part(f"quant.{gemm}", keys.get(gemm, {}))
            allowed = (*OPERANDS_OF[gemm], *OF_ROTATIONS, *(("trust_mask",) if gemm == "fprop" else ()))
            for key in changes or ():
                if key not in allowed:
                    raise UserError(f"quant.{gemm}.{key} is not a key; allowed: {', '.join(allowed)}")
            changes = dict.fromkeys(OPERANDS_OF[gemm]) if changes is None else changes
            made = [_of_gemm(gemm, each, plain[each], changes.get(each, {})) for each in OPERANDS_OF[gemm]]
            rotation = Rotation.from_keys(f"quant.{gemm}", changes.get("hadamard"), changes.get("signs"))
            gemms[gemm] = pair(*made, rotation)
            if gemm == "fprop":
                gemms[gemm] = gemms[gemm]._replace(trust_mask=_of_mask(made, changes.get("trust_mask")))
        _check_samples(plain["gradient"], keys, gemms)
        _check_acts(gemms)
        return cls(name=keys.get("name", "unnamed"), skip=tuple(skip), **gemms)

    def quantizers(self, operand: str) -> list[Quantizer]:
        """Those of an operand, in the order of its GEMMs."""
        pairs = (getattr(self, gemm) for gemm, operands in OPERANDS_OF.items() if operand in operands)
        return [each for each in (getattr(pair, operand) for pair in pairs) if each is not None]

    @property
    def weight(self) -> Quantizer | None:
        """Of the first GEMM that quantizes it."""
        return next(iter(self.quantizers("weight")), None)

    @property
    def activation(self) -> Quantizer | None:
        """Of the first GEMM that quantizes it."""
        return next(iter(self.quantizers("activation")), None)

    @property
    def gradient(self) -> Quantizer | None:
        """Of the first GEMM that quantizes it; with wgrad's samples, where they are all that differs."""
        found = self.quantizers("gradient")
        same = found and found[-1].encoding == found[0].encoding
        return (found[-1] if same else found[0]) if found else None

    @property
    def encodings(self) -> list[Encoding]:
        """Those that occur, each once."""
        return list(dict.fromkeys(each.encoding for operand in OPERANDS for each in self.quantizers(operand)))

    @property
    def caveats(self) -> list[str]:
        """What leaves four bits, or its unbiasedness by design: a line an operand."""
        found = []
        for operand in OPERANDS:
            for each in self.quantizers(operand):
                wide = [f"{each.format} takes {each.form.bits} bits"] if 4 < each.form.bits < 8 else []
                found += [f"{operand}: {text}" for text in (*wide, *each.encoding.biases)]
        for gemm, operands in OPERANDS_OF.items():
            pair = getattr(self, gemm)
            drawn = pair.hadamard is not None and pair.hadamard.signs == "drawn"
            for operand, each in zip(operands, pair.operands, strict=True):
                if each is not None and each.eden and not drawn:
                    found.append(f"{operand}: eden is biased in {gemm} without a rotation by drawn signs")
        return list(dict.fromkeys(found))

    @property
    def has_stochastic_forward(self) -> bool:
        """Whether fprop quantizes with draws."""
        drawn = self.fprop.hadamard is not None and self.fprop.hadamard.signs == "drawn"
        return drawn or any(each is not None and each.is_stochastic for each in self.fprop.operands)

    @property
    def quantizes(self) -> bool:
        """Whether there is any quantizer at all."""
        return any(self.quantizers(operand) for operand in OPERANDS)

    def __str__(self):
        parts = [f"{operand}={self._shown(operand)}" for operand in OPERANDS]
        rotations = {gemm: getattr(self, gemm).hadamard for gemm in GEMMS}
        parts += [f"{gemm}={each}" for gemm, each in rotations.items() if each is not None]
        return ", ".join([*parts, *(["trust mask"] if self.fprop.trust_mask else [])])

    def _shown(self, operand: str) -> str:
        pairs = {name: getattr(self, name) for name, operands in OPERANDS_OF.items() if operand in operands}
        found = {name: str(getattr(pair, operand) or "high precision") for name, pair in pairs.items()}
        first, *others = found.items()
        return " ".join([first[1], *(f"({name}: {shown})" for name, shown in others if shown != first[1])])


def _part(key: str, value: object) -> Mapping | None:
    if value is not None and not isinstance(value, Mapping):
        raise UserError(f"{key}={value!r} must hold keys, such as format, or be null for high precision")
    return value


def _of_gemm(gemm: str, operand: str, plain: Mapping | None, changes: object) -> Quantizer | None:
    """The quantizer of one operand in one GEMM. plain: the keys for all GEMMs; changes: what differs in this one."""
    key = f"quant.{gemm}.{operand}"
    changes = _part(key, changes)
    if changes is None:
        return None
    changes = {name: value for name, value in changes.items() if value is not None}
    if not changes and plain is None:
        return None
    base = {} if "format" in changes or plain is None else dict(plain)
    if gemm == "dgrad" and base.get("samples_scope", "wgrad") == "wgrad":
        base.pop("samples", None)
    return _build(key if changes else f"quant.{operand}", operand, {**base, **changes})


def _of_mask(operands: list[Quantizer | None], value: object) -> bool:
    """From quant.fprop.trust_mask; UserError for what it cannot be, and where no root mean square clips anything."""
    if value is not None and type(value) is not bool:
        raise UserError(f"quant.fprop.trust_mask={value!r} must be true or false")
    if value and not any(each is not None and each.range == "rms" for each in operands):
        raise UserError("quant.fprop.trust_mask is for range=rms of fprop's weight or activation; allowed: false")
    return bool(value)


def _check_samples(plain: Mapping | None, keys: Mapping, gemms: Mapping) -> None:
    """Raise UserError where quant.gradient.samples is lost: a GEMM that should average has a gradient of its own."""
    samples = (plain or {}).get("samples", 1)
    scope = (plain or {}).get("samples_scope", "wgrad")
    for gemm in ("wgrad",) if scope == "wgrad" else ("dgrad", "wgrad"):
        found, changes = gemms[gemm].gradient, (keys.get(gemm) or {}).get("gradient") or {}
        if samples > 1 and changes.get("samples") is None and (found is None or found.samples != samples):
            own = "is in high precision" if found is None else "has a format of its own"
            raise UserError(
                f"quant.gradient.samples={samples} does not reach {gemm}, whose gradient {own}: "
                f"quant.{gemm}.gradient.samples is for that one, quant.gradient.samples=1 for none"
            )


def _check_acts(gemms: Mapping[str, Fprop | Dgrad | Wgrad]) -> None:
    """Raise UserError for keys that would do nothing: a rotation of what is not quantized, or requantize without
    anything that fprop made."""
    for gemm, pair in gemms.items():
        if pair.hadamard is not None and pair.operands == (None, None):
            raise UserError(
                f"quant.{gemm}.hadamard={pair.hadamard.size} rotates for quantizers, of which {gemm} has none; "
                "set it to null"
            )
        for operand, each in zip(OPERANDS_OF[gemm], pair.operands, strict=True):
            if each is not None and each.requantize and getattr(gemms["fprop"], operand) is None:
                raise UserError(
                    f"quant.{gemm}.{operand}.requantize=true takes what fprop made of the {operand}, which it does not "
                    "quantize; allowed: false"
                )


def _build(key: str, operand: str, keys: Mapping) -> Quantizer:
    keys = {name: value for name, value in keys.items() if value is not None}
    for name in OF_GRADIENTS if operand != "gradient" else ():
        if name in keys:
            raise UserError(f"{key}.{name} is not a key: only gradients have one, quant.gradient.{name}")
    keys.pop("samples_scope", None)
    if keys.get("requantize") and key not in MAY_REQUANTIZE:
        raise UserError(f"{key}.requantize is not allowed; it is for {' and '.join(MAY_REQUANTIZE)}")
    try:
        return quantizer(**keys)
    except UserError as error:
        raise UserError(f"{key}.{error}") from None
