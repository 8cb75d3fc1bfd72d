"""The command luqrun-pictures: of one run a layer's gradients under the levels of each format, and each layer's health
over time."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator
from torch import Tensor, nn

from luqrun.config import Config
from luqrun.errors import UserError
from luqrun.quant.convert import quantize_model, quantized_layers, set_step
from luqrun.quant.formats import get_format
from luqrun.quant.recipe import Recipe
from luqrun.report.figures import pyplot, save
from luqrun.report.records import printable
from luqrun.report.stored_config import stored_config, with_own_weights
from luqrun.runs import checkpoint
from luqrun.runs.reading import CONFIG
from luqrun.tasks import build_task
from luqrun.tasks.loader import train_loader
from luqrun.train.tracking import HEALTH

NAME = "luqrun-pictures"
SHOWN = ("e3m0", "int4", "e1m0")
GROUP = "quantization"


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and draw; the exit code."""
    parser = argparse.ArgumentParser(NAME, description="Pictures of one run, from its folder.")
    parser.add_argument("run", type=Path, help="a run folder, with its checkpoint")
    parser.add_argument("--layer", help="whose gradients; default: the middle one")
    parser.add_argument("--out", type=Path, help="where files go; default: RUN/pictures")
    chosen = parser.parse_args(arguments)
    out = chosen.out or chosen.run / "pictures"
    try:
        if not (chosen.run / CONFIG).is_file():
            raise UserError(f"{chosen.run} is not a run folder: it has no {CONFIG}")
        drawings = {
            "health": lambda: draw_health(chosen.run),
            "gradients": lambda: draw_gradients(layer_gradients(chosen.run, chosen.layer)),
        }
        pictures, missing = {}, []
        for name, draw in drawings.items():
            try:
                pictures[name] = draw()
            except NothingToShow as nothing:
                missing.append(f"no picture of {name}: {nothing}")
        if not pictures:
            raise UserError("; ".join(missing))
        out.mkdir(parents=True, exist_ok=True)
        paths = [path for name, figure in pictures.items() for path in save(figure, out, name)]
    except (UserError, OSError) as error:
        parser.exit(1, f"{NAME}: {printable(str(error))}\n")
    print("\n".join(map(str, paths)))
    for line in missing:
        print(f"{NAME}: {printable(line)}", file=sys.stderr)
    return 0


class NothingToShow(UserError):
    """A run has not left, or does not have, what a picture shows: its other pictures can be drawn."""


@dataclass(frozen=True)
class LayerGradient:
    """The gradient of a quantized layer's output. state: of what weights and how it was computed; run: its name."""

    layer: str
    values: Tensor
    state: str
    run: str


def layer_gradients(run: Path, layer: str | None) -> LayerGradient:
    """Of the first batch of the epoch to come: layers at 4 bits in either phase, the rest in the run's precision."""
    config = stored_config(run)
    path = run / "checkpoints" / checkpoint.LAST
    if not path.exists():
        raise NothingToShow(f"{path} is not there")
    task = build_task(with_own_weights(config, run, path))
    recipe = Recipe.from_config(config.quant)
    model = quantize_model(task.network(), recipe, seed=config.seed, example=task.example())
    content = checkpoint.read(path)
    try:
        model.load_state_dict(content["model"])
    except RuntimeError:
        raise UserError(f"{path} is of another model than {run / CONFIG} says") from None
    set_step(model, content["progress"]["step"])
    # Attention as a whole returns a tuple; what is quantized behind it is its out_proj, a layer too.
    layers = {name: each for name, each in quantized_layers(model) if not isinstance(each, nn.MultiheadAttention)}
    if not layers:
        raise NothingToShow(f"quant={config.quant.name} quantizes no layer")
    if layer is not None and layer not in layers:
        raise UserError(f"--layer {layer} is not known; allowed: {', '.join(layers)}")
    name = layer or list(layers)[len(layers) // 2]
    found: list[Tensor] = []

    def watch(module, given, output):
        output.register_hook(found.append)

    layers[name].register_forward_hook(watch)
    batch = next(iter(train_loader(task.data, config.dataset, config.seed, content["progress"]["epoch"])))
    model.to(memory_format=torch.channels_last).train()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=config.precision == "bf16"):
        loss, _ = task.loss(model, batch)
    loss.backward()
    state = f"{_weights(config, content['progress'])}; layers at 4 bits, the rest in {config.precision}"
    return LayerGradient(name, found[0].detach().float(), state, name_of(run))


def _weights(config: Config, progress: dict) -> str:
    """Which weights a checkpoint holds."""
    trained, tuned = min(progress["epoch"], config.schedule.epochs), progress["epoch"] - config.schedule.epochs
    tuned = f" and {tuned} of fine-tuning" if tuned > 0 else ""
    return f"weights of step {progress['step']}, after epoch {trained}{tuned}"


def name_of(run: Path) -> str:
    """A run's study and id, as its folders are called."""
    return printable("/".join(run.resolve().parts[-2:]))


def draw_gradients(gradient: LayerGradient):
    """The distribution of log2 |gradient| relative to its maximum, and under it the levels of each format."""
    plt = pyplot()
    magnitude = gradient.values.abs().flatten()
    largest = magnitude.max().item()
    if not 0 < largest < float("inf"):
        raise NothingToShow(f"the gradient of {gradient.layer} is zero or not finite: there is no distribution")
    relative = (magnitude[magnitude > 0] / largest).log2().numpy()
    figure, axes = plt.subplots(2, 1, figsize=(7, 4.6), sharex=True, height_ratios=(3, 1))
    axes[0].hist(relative, bins=160, range=(-24, 0), density=True, color="0.6")
    zeros = (magnitude == 0).float().mean().item()
    axes[0].set(ylabel="density")
    axes[0].set_title(f"gradient of {gradient.layer}'s output ({zeros:.1%} are zero)\n{gradient.state}", fontsize=10)
    for height, format in enumerate(reversed(SHOWN)):
        form = get_format(format)
        levels = torch.tensor([level for level in form.levels() if level > 0]) / form.limit
        under = (torch.from_numpy(relative) < levels.min().log2()).float().mean().item()
        axes[1].plot(levels.log2(), [height] * len(levels), "|", markersize=12, markeredgewidth=2, color=f"C{height}")
        axes[1].text(-24, height, f"{under:.0%} below the smallest level", va="center", fontsize=8)
    axes[1].set_yticks(range(len(SHOWN)), reversed(SHOWN))
    axes[1].set(xlabel="log2 of |gradient| / maximum", ylim=(-0.6, len(SHOWN) - 0.4), xlim=(-24.5, 0.5))
    _caption(figure, gradient.run)
    return figure


def draw_health(run: Path):
    """Clipped share, underflow share and relative error of each layer's operands, over the steps of the run."""
    events = EventAccumulator(str(run), size_guidance={SCALARS: 0})
    events.Reload()
    tags = [tag for tag in events.Tags()[SCALARS] if re.fullmatch(rf"{GROUP}/[^/]+/[^/]+/[^/]+", tag)]
    if not tags:
        raise NothingToShow(
            f"{run} has no curves of quantization: tracking.health_every=0, or a recipe without quantizers"
        )
    operands = sorted({tag.rpartition("/")[2] for tag in tags})
    plt = pyplot()
    size = (4 * len(operands), 2.4 * len(HEALTH))
    figure, axes = plt.subplots(len(HEALTH), len(operands), figsize=size, sharex=True, squeeze=False)
    layers = list(dict.fromkeys(tag.split("/")[2] for tag in tags))
    colors = plt.get_cmap("viridis")(torch.linspace(0, 0.95, len(layers)).numpy())
    for row, metric in zip(axes, HEALTH, strict=True):
        for panel, operand in zip(row, operands, strict=True):
            for layer, color in zip(layers, colors, strict=True):
                tag = f"{GROUP}/{metric}/{layer}/{operand}"
                if tag in tags:
                    points = events.Scalars(tag)
                    panel.plot([p.step for p in points], [p.value for p in points], color=color, label=layer)
            panel.set_ylim(bottom=0)
        row[0].set_ylabel(metric.replace("_", " "))
    for panel, operand in zip(axes[0], operands, strict=True):
        panel.set_title(operand)
    for panel in axes[-1]:
        panel.set_xlabel("step")
    figure.legend(
        *axes[0][0].get_legend_handles_labels(), loc="upper left", bbox_to_anchor=(1, 0.95), fontsize=7, frameon=False
    )
    figure.tight_layout()
    _caption(figure, name_of(run))
    return figure


def _caption(figure, run: str) -> None:
    figure.text(0.01, -0.02, run, fontsize=7, va="top")
