"""A recipe: a quantizer, or none, for each operand of a layer's GEMMs, and the layers left alone.

A recipe is one YAML under conf/quant/: a new scheme that mixes known parts needs no Python.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from luqrun.config import QuantConfig, conf_dir
from luqrun.errors import UserError
from luqrun.quant.formats import Format
from luqrun.quant.quantizer import Quantizer

OPERANDS = ("weight", "activation", "gradient")


@dataclass(frozen=True)
class Recipe:
    """Quantizers of the three operands (None: high precision) and `skip`.

    skip: first, last, shortcut, or patterns (fnmatch) of module names, for the layers kept in high precision.
    """

    name: str
    weight: Quantizer | None = None
    activation: Quantizer | None = None
    gradient: Quantizer | None = None
    skip: tuple[str, ...] = ("first", "last", "shortcut")

    @property
    def forms(self) -> list[Format]:
        """The formats of the operands that are quantized."""
        return [quantizer.form for quantizer in (self.weight, self.activation, self.gradient) if quantizer is not None]

    @property
    def has_stochastic_forward(self) -> bool:
        """Whether weights or activations are quantized with draws."""
        return any(each is not None and each.is_stochastic for each in (self.weight, self.activation))

    @classmethod
    def from_config(cls, config: QuantConfig) -> Recipe:
        """From the `quant` part of the config; UserError names the key that is wrong."""
        if not all(isinstance(entry, str) for entry in config.skip):  # OmegaConf lets a list in a list pass
            raise UserError(f"quant.skip={list(config.skip)} must be a list of names, such as [first, last, shortcut]")
        quantizers = {
            operand: part and Quantizer.from_config(part, f"quant.{operand}")
            for operand in OPERANDS
            for part in [getattr(config, operand)]
        }
        return cls(name=config.name, skip=tuple(config.skip), **quantizers)

    @property
    def quantizes(self) -> bool:
        """Whether there is any quantizer at all."""
        return any(getattr(self, operand) for operand in OPERANDS)

    def __str__(self):
        return ", ".join(f"{operand}={getattr(self, operand) or 'high precision'}" for operand in OPERANDS)


def recipe(name: str, **overrides) -> Recipe:
    """The recipe of conf/quant/<name>.yaml, or of a YAML file of one's own (a path), with overrides as keywords.

    Keywords are the keys of the file (weight, activation, gradient: None, or a dict of the keys to change; skip) and,
    for short, `samples` and `samples_scope` of the gradient. Raises UserError for unknown names, keys and values.

    >>> recipe("luq", samples=2, skip=())
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    known = sorted(path.stem for path in (conf_dir() / "quant").glob("*.yaml"))
    path = Path(name) if name.endswith(".yaml") else conf_dir() / "quant" / f"{name}.yaml"
    if not path.is_file():
        raise UserError(f"recipe {name!r} is not known; allowed: {', '.join(known)}, or the path of a .yaml file")
    for key in ("samples", "samples_scope"):
        if key in overrides:
            if overrides.get("gradient", {}) is None:
                raise UserError(f"{key} is a setting of the gradient's quantizer, and gradient=None removes it")
            overrides["gradient"] = {**(overrides.get("gradient") or {}), key: overrides.pop(key)}
    if "skip" in overrides:
        if overrides["skip"] is None or isinstance(overrides["skip"], str):
            raise UserError(f"skip={overrides['skip']!r} must be a list, such as [first, last, shortcut]")
        overrides["skip"] = list(overrides["skip"])
    try:
        config = OmegaConf.merge(QuantConfig, OmegaConf.load(path), overrides)
        return Recipe.from_config(OmegaConf.to_object(config))
    except OmegaConfBaseException as error:
        from luqrun.cli.messages import one_line  # with Hydra, whose errors it knows too

        raise UserError(f"recipe {name!r}: {one_line(error)}") from None
