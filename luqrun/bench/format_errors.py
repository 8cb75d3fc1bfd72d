"""What each format and scale rule does to a tensor, drawn or real: error, bias, shrinkage, what it clips."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from luqrun.quant.grids import Lines
from luqrun.quant.kernels.philox import make_stream
from luqrun.quant.quantizer import Quantizer
from luqrun.quant.rotation import Rotation, rotate, signs_of

DRAWS = 8  # of what is stochastic
NVFP4 = {"format": "e2m1", "block": 16, "scale_format": "e4m3"}
MXFP4 = {"format": "e2m1", "block": 32}
STOCHASTIC = {"rounding": "stochastic"}
SAFE = 6 * 16 / 17  # the range that leaves room for an e4m3 scale that was rounded down
QUANTIZERS = {
    "int4, sawb": {"format": "int4", "range": "sawb"},
    "int4, stochastic": {"format": "int4", **STOCHASTIC},
    "e3m0, LUQ": {"format": "e3m0", **STOCHASTIC},
    "e3m0, nearest": {"format": "e3m0"},
    "e3m0, as Xi et al. coded it": {"format": "e3m0_xi", "rounding": "stochastic_log"},
    "e3m0, LUQ's supplement": {"format": "e3m0_div128", "range": "signed_max", **STOCHASTIC},
    **{f"mxfp4, {rule}": {**MXFP4, "scale_rounding": rule} for rule in ("floor", "rceil", "even", "ceil")},
    "mxfp4, rms clip": {**MXFP4, "range": "rms", "scale_rounding": "floor"},
    "mxfp4, floor, stochastic": {**MXFP4, "scale_rounding": "floor", **STOCHASTIC},
    "mxfp4, floor, 3/4, stochastic": {**MXFP4, "scale_rounding": "floor", "headroom": 0.75, **STOCHASTIC},
    "mxfp4, rceil, stochastic": {**MXFP4, **STOCHASTIC},
    "nvfp4": NVFP4,
    "nvfp4, tiles": {**NVFP4, "block": [16, 16]},
    "nvfp4, four over six": {**NVFP4, "four_over_six": "mse"},
    "nvfp4, stochastic": {**NVFP4, **STOCHASTIC},
    "nvfp4, 16/17, stochastic": {**NVFP4, "largest": SAFE, **STOCHASTIC},
    "nvfp4, four over six, 16/17, stochastic": {**NVFP4, "four_over_six": "mse", "largest": SAFE, **STOCHASTIC},
    "nvfp4, MS-EDEN": {**NVFP4, "eden": True, "largest": SAFE / 0.93},
}
# Of 2^(floor(f + u + s) - f) the mean over f and u from 0 to 1: f the fraction of the logarithm, s = ln(4/3) - 1/2.
XI_GAIN = 0.898
# Mean squared errors on N(0, 1) that Quartet II (arXiv 2601.22813) published, 1e-3.
PUBLISHED = {
    "nvfp4": 9.0,
    "nvfp4, four over six": 7.6,
    "nvfp4, tiles": 12.4,
    "nvfp4, 16/17, stochastic": 23.5,
    "nvfp4, four over six, 16/17, stochastic": 17.5,
    "nvfp4, MS-EDEN": 9.4,
}
ROTATED = ("int4, sawb", "e3m0, LUQ", "mxfp4, floor", "nvfp4", "nvfp4, MS-EDEN")  # with Hadamards of 128, too


@dataclass(frozen=True)
class Errors:
    """Of one tensor and quantizer. mse: of the mean square, 1e-3. gain: <x, Q(x)> / <x, x>, 1 where nothing shrinks.
    z: of the mean error towards larger magnitudes over the draws, in standard deviations; None where no element is
    drawn (of MS-EDEN the scales are: it is unbiased over the rotations before it). clipped: the share beyond the
    largest value of its scale. bits: of an element, scales included. values: those that one scale has. closed_gain:
    what follows from the rule alone, 1 of what is drawn without a bias, and of Xi et al.'s rounding the mean over
    log-uniform magnitudes.
    """

    tensor: str
    quantizer: str
    mse: float
    gain: float
    z: float | None
    clipped: float
    bits: float
    values: int
    closed_gain: float | None


def format_errors(tensors: dict[str, Tensor]) -> Iterator[Errors]:
    """Those of each quantizer on each tensor (2-d, float32), blocks along the last axis."""
    for name, x in tensors.items():
        for label, keys in QUANTIZERS.items():
            quantizer = Quantizer(**keys)
            yield _errors(name, label, quantizer, x)
            if label in ROTATED and x.shape[-1] % 128 == 0:
                rotation = Rotation(128, "fixed")
                signs = signs_of(rotation, make_stream(0), "fprop")
                rotated = rotate(x, Lines.along(x.shape, 1), rotation, signs)
                yield _errors(name, f"{label}, hadamard 128", quantizer, rotated)


def _errors(name: str, label: str, quantizer: Quantizer, x: Tensor) -> Errors:
    draws = DRAWS if quantizer.is_stochastic else 1
    values, towards, clipped = [], [], 0.0
    exact, magnitude = x.double(), x.double().abs()
    for seed in range(draws):
        quantized = quantizer.quantize(x, seed=seed)
        value = quantized.dequantize().double()
        values.append(value)
        towards.append(((value - exact) * exact.sign()).mean().item())
        most = quantized.most(x.shape).double()
        clipped += (magnitude > most * (1 + 1e-6)).double().mean().item() / draws
    square = exact.square().sum()
    mse = sum((value - exact).square().sum() for value in values) / draws / square
    gain = sum((value * exact).sum() for value in values) / draws / square
    z = None
    if draws > 1 and not quantizer.eden:
        # Of each element the spread of its draws: what the mean error would have if it were zero in truth.
        spread = torch.stack(values).var(0).sum().sqrt().item() / x.numel() / math.sqrt(draws)
        z = sum(towards) / draws / spread if spread else None
    values = len(quantizer.form.levels())
    return Errors(
        name, label, 1e3 * mse.item(), gain.item(), z, clipped, _bits(quantizer), values, closed_gain(quantizer)
    )


def closed_gain(quantizer: Quantizer) -> float | None:
    """The mean of Q(x) / x that follows from the rule; None where it depends on the numbers."""
    if quantizer.rounding == "stochastic_log":
        return XI_GAIN
    return 1.0 if quantizer.is_stochastic and not quantizer.encoding.biases else None


def _bits(quantizer: Quantizer) -> float:
    if quantizer.block is None:
        return quantizer.form.bits
    sides = quantizer.encoding.tile or (1, quantizer.block)
    return quantizer.form.bits + 8 / math.prod(sides)


def drawn(rows: int = 1024, columns: int = 1024) -> dict[str, Tensor]:
    """Numbers of mean square 1: normal, and from Laplace's distribution."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(rows, columns, generator=generator)
    uniform = torch.rand(rows, columns, generator=generator) - 0.5
    laplace = -uniform.sign() * torch.log1p(-2 * uniform.abs()) / math.sqrt(2)
    return {"N(0, 1)": normal, "Laplace": laplace.clamp(-100, 100)}


def real(model: nn.Module, layer: str, step) -> dict[str, Tensor]:
    """The weight, input and output's gradient of a layer (linear or convolution) in step(), which trains the model
    once; as matrices, channels or features last, whole multiples of 128 numbers a row where there are enough rows."""
    module, found = model.get_submodule(layer), {}

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        found["activations"] = inputs[0].detach()
        output.register_hook(lambda gradient: found.__setitem__("gradients", gradient.detach()))

    handle = module.register_forward_hook(keep)
    try:
        step()
    finally:
        handle.remove()
    return {"weights": _matrix(module.weight.detach()), **{name: _matrix(x) for name, x in sorted(found.items())}}


def _matrix(x: Tensor) -> Tensor:
    last = x.movedim(1, -1) if x.dim() == 4 else x
    flat = last.reshape(-1)
    flat = flat[: len(flat) // 128 * 128]
    return flat.view(-1, 128).float() / flat.float().square().mean().sqrt()


def markdown(found: Sequence[Errors]) -> str:
    """A table a tensor."""
    parts = []
    for tensor in dict.fromkeys(each.tensor for each in found):
        rows = [each for each in found if each.tensor == tensor]
        published = tensor == "N(0, 1)"
        head = [
            "quantizer",
            "values",
            "bits",
            "MSE, 1e-3",
            *(["published"] if published else []),
            "gain",
            "closed form",
            "z of the bias",
            "clipped",
        ]
        lines = [head, ["---"] * len(head)]
        for each in rows:
            known = [f"{PUBLISHED[each.quantizer]:.1f}" if each.quantizer in PUBLISHED else ""] if published else []
            z = "" if each.z is None else f"{each.z:+.1f}"
            closed = "" if each.closed_gain is None else f"{each.closed_gain:g}"
            cells = [each.quantizer, str(each.values), f"{each.bits:g}", f"{each.mse:.2f}", *known]
            lines.append([*cells, f"{each.gain:.4f}", closed, z, f"{100 * each.clipped:.2f} %"])
        parts.append(f"**{tensor}**\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(parts) + "\n"
