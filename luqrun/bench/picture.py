"""The picture of a step's time by kind."""

from __future__ import annotations

from pathlib import Path

from luqrun.bench.report import REQUIREMENTS
from luqrun.bench.timing import Timings
from luqrun.train.profiling import KINDS, OTHER

BASES = {"cpu": "fp32", "cuda": "bf16"}  # what the bars are measured against
NAME = "step"


def draw(record: dict, folder: Path) -> list[Path]:
    """Write step.svg and step.png: a bar a contender, its time in units of the base's, split by the profile's shares.

    record: of a run with the section `step`. Of its cases, those of which something is required, or all where there
    is none. A case without its base is left out. Raises ModuleNotFoundError without matplotlib (the extra `plot`).
    """
    import matplotlib
    from matplotlib.figure import Figure

    base, required = BASES[record["machine"]["device"]], {each.case for each in REQUIREMENTS if each.section == "step"}
    cases = {name: case for name, case in record["sections"]["step"].items() if base in case["rounds"]}
    cases = {name: case for name, case in cases.items() if name in required} or cases
    if not cases:
        return []
    colours = dict(zip((*KINDS, OTHER), matplotlib.colormaps["tab10"].colors, strict=False))
    heights = [1 + 0.35 * len(case["seconds_by_kind"]) for case in cases.values()]
    figure = Figure(figsize=(9, sum(heights) + 0.6), layout="constrained")
    axes = figure.subplots(len(cases), 1, squeeze=False, height_ratios=heights)[:, 0]
    for ax, (model, case) in zip(axes, cases.items(), strict=True):
        timings = Timings(case["rounds"])
        for row, (name, kinds) in enumerate(case["seconds_by_kind"].items()):
            length, total, left = timings.ratio(name, base)["median"], sum(kinds.values()) or 1.0, 0.0
            for kind, seconds in kinds.items():
                ax.barh(row, length * seconds / total, left=left, color=colours[kind], height=0.7)
                left += length * seconds / total
            ax.text(left, row, f" {length:.2f}", va="center", fontsize=8)
        ax.set_yticks(range(len(case["seconds_by_kind"])), list(case["seconds_by_kind"]), fontsize=8)
        ax.invert_yaxis()
        ax.axvline(1, color="black", linewidth=0.6, linestyle=":")
        ax.margins(x=0.08)
        ax.spines[["top", "right"]].set_visible(False)
        ax.set_title(f"{model}, {case['workload']['shape']}", fontsize=10, loc="left")
    axes[-1].set_xlabel(f"training step's time, {base} = 1")
    used = [kind for kind in colours if any(k[kind] for c in cases.values() for k in c["seconds_by_kind"].values())]
    handles = [matplotlib.patches.Patch(color=colours[kind], label=kind) for kind in used]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(used), fontsize=8, frameon=False)
    paths = [folder / f"{NAME}.svg", folder / f"{NAME}.png"]
    with matplotlib.rc_context({"svg.hashsalt": "luqrun"}):
        figure.savefig(paths[0], metadata={"Date": None})
    figure.savefig(paths[1], dpi=150)
    return paths
