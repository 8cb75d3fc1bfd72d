"""Recipes for Python: by the name of a file in conf/quant/, or by a path."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from luqrun.config import conf_dir
from luqrun.errors import UserError

if TYPE_CHECKING:
    from luqrun.quant.recipe import Recipe


def recipe(name: str, **overrides) -> Recipe:
    """The recipe of conf/quant/<name>.yaml, or of a YAML file of one's own (a path), with overrides as keywords.

    Keywords are the keys of the file (weight, activation, gradient, fprop, dgrad, wgrad: None, or a dict of the keys to
    change; skip) and, for short, `samples` and `samples_scope` of the gradient. Raises UserError for unknown names,
    keys and values.

    >>> recipe("luq", samples=2, skip=())
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    from luqrun.quant.recipe import Recipe

    known = sorted(path.stem for path in (conf_dir() / "quant").glob("*.yaml"))
    path = Path(name) if name.endswith(".yaml") else conf_dir() / "quant" / f"{name}.yaml"
    if not path.is_file():
        raise UserError(f"recipe {name!r} is not known; allowed: {', '.join(known)}, or the path of a .yaml file")
    for key in ("samples", "samples_scope"):
        if key in overrides:
            if overrides.get("gradient", {}) is None:
                raise UserError(f"{key} is a setting of the gradient's quantizer, and gradient=None removes it")
            overrides["gradient"] = {**(overrides.get("gradient") or {}), key: overrides.pop(key)}
    try:
        keys = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"recipe file {path}: {' '.join(str(error).split())}") from None
    if not isinstance(keys, dict):
        raise UserError(f"recipe file {path} must hold keys, such as weight and gradient")
    try:
        return Recipe.from_keys({"name": path.stem, **_merged(keys, overrides)})
    except UserError as error:
        raise UserError(f"recipe {name!r}: {error}") from None


def _merged(keys: dict, changes: Mapping) -> dict:
    """Nested dicts, the second over the first."""
    found = dict(keys)
    for key, value in changes.items():
        nested = isinstance(value, Mapping) and isinstance(found.get(key), Mapping)
        found[key] = _merged(found[key], value) if nested else value
    return found
