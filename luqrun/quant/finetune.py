"""The last phase of a training: which operands of which GEMMs are in high precision while it trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from luqrun.errors import UserError, check_choice
from luqrun.quant.recipe import OPERANDS_OF, Recipe

# By GEMM, the operands in high precision. fnt: the LUQ paper's, 5.2, weights alone stay quantized. forward_high: of
# NVIDIA's NVFP4 training (arXiv 2509.25149, appendix D). qaf: of Chmiel et al. 2025 (arXiv 2505.19115), where it is not
# verified whether the backward GEMMs take weights and activations as they are, as here, or quantized.
PHASES = {
    "fnt": {"fprop": ("activation",), "dgrad": ("gradient",), "wgrad": ("gradient", "activation")},
    "forward_high": {"fprop": ("activation", "weight")},
    "qaf": {"dgrad": ("gradient", "weight"), "wgrad": ("gradient", "activation")},
}


class Phase(NamedTuple):
    """What becomes of a recipe in the phase, in training mode and in evaluation mode.

    In evaluation mode gradients alone are in high precision, where the phase has them so: a forward pass is the
    recipe's own, and so is what its backward pass keeps of it.
    """

    training: Recipe
    evaluation: Recipe

    @classmethod
    def of(cls, recipe: Recipe, operands: Mapping[str, Sequence[str]]) -> Phase:
        """operands: by GEMM, those in high precision, checked before (phase_operands)."""
        gradients = {gemm: [name for name in names if name == "gradient"] for gemm, names in operands.items()}
        return cls(_with_high_precision(recipe, operands), _with_high_precision(recipe, gradients))


def phase_operands(phase: bool | str | Mapping[str, Sequence[str]]) -> Mapping[str, Sequence[str]] | None:
    """By GEMM, the operands in high precision of a phase: its name, True for fnt, or they themselves; None for False.

    Raises UserError for what is none of these.
    """
    if isinstance(phase, bool):
        return PHASES["fnt"] if phase else None
    if isinstance(phase, Mapping):
        check_operands("phase", phase)
        return phase
    if not isinstance(phase, str) or phase not in PHASES:
        allowed = f"{', '.join(PHASES)}, True (fnt), False, or operands by GEMM, such as {{'fprop': ['activation']}}"
        raise UserError(f"phase={phase!r} is not known; allowed: {allowed}")
    return PHASES[phase]


def check_operands(key: str, operands: Mapping[str, Sequence[str]]) -> None:
    """Raise UserError, below the name `key`, for what is no GEMM, no list, or no operand of its GEMM."""
    for gemm, names in operands.items():
        check_choice(key, gemm, OPERANDS_OF)
        allowed = OPERANDS_OF[gemm]
        if not isinstance(names, list | tuple | set | frozenset):
            raise UserError(f"{key}.{gemm}={names!r} must be a list of operands; allowed: {', '.join(allowed)}")
        for name in names:
            check_choice(f"{key}.{gemm}", name, allowed)


def _with_high_precision(recipe: Recipe, operands: Mapping[str, Sequence[str]]) -> Recipe:
    """The recipe without the quantizers of these operands."""
    pairs = {gemm: getattr(recipe, gemm)._replace(**dict.fromkeys(names)) for gemm, names in operands.items()}
    return replace(recipe, **pairs)
