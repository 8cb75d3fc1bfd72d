"""job=rounding: the bias, variance and mean squared error of a recipe's quantizers, beside their closed forms.

For x in a bin [l, u] (Table 1): round to nearest has bias min(x - l, u - x), variance 0; stochastic rounding has
bias 0, variance (x - l)(u - x). Nothing is trained.
"""

from __future__ import annotations

import logging
import math

import torch
from torch import Tensor

from luqrun.config import Config
from luqrun.errors import UserError
from luqrun.quant import kernels
from luqrun.quant.kernels.philox import make_stream
from luqrun.quant.quantizer import Quantizer
from luqrun.quant.recipe import OPERANDS, Recipe
from luqrun.runs.folder import RunFolder, now
from luqrun.runs.reading import SUMMARY
from luqrun.train.kernel_compilation import compile_kernels

log = logging.getLogger(__name__)

POINTS = 41
DRAWS = 1 << 15


def run(config: Config, folder: RunFolder) -> dict:
    """Measure each operand's quantizer, of the first GEMM that has one, in three of its bins; write summary.json.

    Raises UserError for a recipe without quantizers, or with some that have no bins.
    """
    recipe = Recipe.from_config(config.quant)
    if not recipe.quantizes:
        raise UserError(f"job=rounding: quant={recipe.name} quantizes nothing; choose another quant=")
    _check(recipe)
    folder.update_run(device="cpu", kernel_backend=kernels.describe("cpu"))
    quantizers = [getattr(recipe, operand) for operand in OPERANDS if getattr(recipe, operand) is not None]
    compile_kernels(lambda: [quantizer.quantize(torch.ones(4)) for quantizer in quantizers], no_bar=None)
    rows = []
    for number, operand in enumerate(OPERANDS):
        quantizer = getattr(recipe, operand)
        for lower, upper in bins(quantizer) if quantizer is not None else ():
            # Draws of its own for each bin and operand: else all rows would tell the same chance deviation.
            deviations = measure(quantizer, lower, upper, make_stream(config.seed, layer=lower, operand=number))
            rows.append({"operand": operand, "quantizer": str(quantizer), **deviations})
    for row in rows:
        log.info("%s %s in %s: largest |z| of the bias %.2f", row["operand"], row["quantizer"], row["bin"], row["z"])
    summary = {"rounding": rows}
    folder.update_run(status="finished", end=now())
    folder.write_json(SUMMARY, summary)
    return summary


def _check(recipe: Recipe) -> None:
    """Raise UserError for quantizers without bins of their own: the scale of a block depends on all of it, and rounding
    in the logarithm has no closed form here."""
    for operand in OPERANDS:
        quantizer = getattr(recipe, operand)
        if quantizer is not None and (quantizer.block is not None or quantizer.rounding == "stochastic_log"):
            key, value = ("block", quantizer.block) if quantizer.block is not None else ("rounding", quantizer.rounding)
            raise UserError(
                f"job=rounding measures a quantizer in its bins, which quant.{operand}.{key}={value} has not; "
                "scripts/format_errors.py measures errors and bias of whole tensors"
            )


def bins(quantizer: Quantizer) -> list[tuple[int, int]]:
    """The lowest, a middle and the highest bin, in units of the smallest step."""
    levels = [level for level in quantizer.form.levels() if level >= 0]
    last = len(levels) - 1
    return [(levels[i], levels[i + 1]) for i in sorted({0, last // 2, last - 1})]


def measure(quantizer: Quantizer, lower: int, upper: int, stream: Tensor) -> dict:
    """Bias, variance and mean squared error over DRAWS quantizations of POINTS values from lower to upper.

    Both as measured and in closed form; z: the largest deviation of a mean from its closed form, in standard errors
    (0 where nothing is drawn). stream: names the draws (luqrun.quant.kernels.philox).
    """
    x = torch.linspace(lower, upper, POINTS, dtype=torch.float64).float()
    repeated = x.repeat_interleave(DRAWS)
    scale, signed = torch.tensor(1.0), torch.tensor(True)
    codes = quantizer.encode(repeated, scale, signed, stream).view(POINTS, DRAWS)
    values = codes.double()
    mean, at = values.mean(1), x.double()
    bias, variance = mean - at, values.var(1, correction=0)
    nearest, spread = torch.minimum(at - lower, upper - at), (at - lower) * (upper - at)
    drawn = quantizer.underflow if lower == 0 and quantizer.form.logarithmic else quantizer.rounding
    if drawn == "stochastic":
        expected = {"bias": torch.zeros_like(at), "variance": spread, "mse": spread}
    elif drawn == "nearest":
        expected = {"bias": nearest, "variance": torch.zeros_like(at), "mse": nearest**2}
    else:  # flush
        expected = {"bias": torch.where(at < upper, at - lower, 0.0), "variance": torch.zeros_like(at)}
        expected["mse"] = expected["bias"] ** 2
    error = (spread / DRAWS).sqrt()
    z = torch.where(error > 0, bias.abs() / error.clamp(min=1e-30), bias.abs() * math.inf).nan_to_num(0.0)
    return {
        "bin": [lower, upper],
        "draws": DRAWS,
        "drawn": drawn,
        "x": _listed(at),
        "measured": {"bias": _listed(bias.abs()), "variance": _listed(variance), "mse": _listed(variance + bias**2)},
        "closed_form": {name: _listed(values) for name, values in expected.items()},
        "z": z.max().item() if drawn == "stochastic" else 0.0,
    }


def _listed(values: Tensor) -> list[float]:
    return [round(value, 9) for value in values.tolist()]
