"""The picture of a step's matrix work: a bar a layer, stacked by GEMM, coloured by precision."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from luqrun.cost.gemms import Gemm

NAME = "cost"
SHADES = {"fprop": 0, "dgrad": 1, "wgrad": 2}
PALETTES = {4: "Blues", 8: "Greens", None: "Greys"}
WORDS = {4: "4 bits", 8: "8 bits", None: "high precision"}


def draw(gemms: Sequence[Gemm], title: str, folder: Path) -> list[Path]:
    """Write cost.svg and cost.png: multiply-accumulates of each layer, in the order in which the forward pass comes to
    them. Raises ModuleNotFoundError without matplotlib (the extra `plot`)."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    layers = list(dict.fromkeys((gemm.layer, gemm.kind) for gemm in gemms))
    place = {layer: at for at, layer in enumerate(layers)}
    figure = Figure(figsize=(7, 1.6 + 0.16 * len(layers)), layout="constrained")
    axes, ends, colours = figure.subplots(), [0.0] * len(layers), {}
    for gemm in gemms:
        at, giga = place[gemm.layer, gemm.kind], (gemm.macs or 0) * gemm.passes / 1e9
        shade = matplotlib.colormaps[PALETTES[gemm.width]](0.85 - 0.25 * SHADES[gemm.gemm])
        colours[f"{gemm.gemm}, {WORDS[gemm.width]}"] = shade
        axes.barh(at, giga, left=ends[at], color=shade, height=0.8)
        ends[at] += giga
    for at, (layer, _) in enumerate(layers):
        if any(gemm.macs is None for gemm in gemms if gemm.layer == layer):
            axes.text(ends[at], at, " not known", va="center", fontsize=6)
    axes.set_yticks(range(len(layers)), [name or "the model" for name, _ in layers], fontsize=5.5)
    axes.set_ylim(len(layers) - 0.5, -0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("10⁹ multiply-accumulates a step, all samples of a gradient counted")
    axes.set_title(title, fontsize=9, loc="left")
    handles = [Patch(color=colour, label=label) for label, colour in colours.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=7, frameon=False)
    paths = [folder / f"{NAME}.svg", folder / f"{NAME}.png"]
    with matplotlib.rc_context({"svg.hashsalt": "luqrun", "text.parse_math": False}):
        figure.savefig(paths[0], metadata={"Date": None})
        figure.savefig(paths[1], dpi=150)
    return paths
