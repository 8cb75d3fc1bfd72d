"""Which cells a table has: read from the experiment that fills it, conf/experiment/TABLE/SCALE.yaml."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from omegaconf import OmegaConf

from luqrun.config import conf_dir
from luqrun.errors import UserError

TITLES = {
    "table1": "Table 1: bias, variance and mean squared error of rounding, measured and in closed form",
    "fig1a": "Fig. 1a: mean squared error of RDN and SR over [0, 1]",
    "fig1b": "Fig. 1b: RDN or SR in the forward quantizer, gradients in full precision",
    "fig1c": "Fig. 1c: RDN or SR in the gradient quantizer, forward in full precision",
    "fig2": "Fig. 2: parts of LUQ",
    "table2": "Table 2: LUQ and LUQ + SMP",
    "table3": "Table 3: fine-tuning LUQ + SMP",
    "table6": "Table 6: only the forward, only the backward, both",
    "fig5": "Fig. 5: samples of 2-bit gradients",
    "options": "Options: hindsight, power-of-two scales, re-used random numbers",
}
ROUNDING_TABLES = ("table1", "fig1a")  # by job=rounding; the others are of trainings
# What a table's cells are compared with: (row, column), where None stands for the cell's own.
BASELINES = {
    "fig1b": ("fp32", None),
    "fig1c": ("fp32", None),
    "fig2": ("fp32", None),
    "table2": (None, "fp32"),
    "table3": (None, "fp32_none"),
    "table6": (None, "fp32"),
    "fig5": ("forward_only", None),
    "options": ("luq", None),
}


@dataclass(frozen=True)
class Expected:
    """A run that a table wants: its cell, its seed and the command that makes it."""

    row: str
    column: str
    seed: int
    command: str


def check_tables(names: list[str]) -> None:
    """UserError for a name that is no table, with the known ones."""
    for name in names:
        if name not in TITLES:
            raise UserError(f"table {name} is not known; allowed: {', '.join(TITLES)}")


def expected(table: str, scale: str, shared: Sequence[str] = ()) -> list[Expected]:
    """The runs that `luqrun -m +experiment=TABLE/SCALE` makes; none where there is no such experiment.

    shared: the overrides of all runs that there are; a model among them that the experiment has not replaces its own.
    A command that needs dataset.root says DIR, where that is not among them.
    """
    path = conf_dir() / "experiment" / table / f"{scale}.yaml"
    if not path.is_file():
        return []
    experiment = OmegaConf.load(path)
    if "hydra" not in experiment:  # a single run of another experiment's
        return []
    params = OmegaConf.to_container(experiment.hydra.sweeper.params)
    choices = {key: [f"{key}={value}" for value in str(values).split(",")] for key, values in params.items()}
    own = [given for given in shared if given.startswith("model=")]
    if own and own[0] not in choices.get("model", own):
        choices["model"] = own
    known = any(given.startswith("dataset.root=") for given in shared)
    root = " dataset.root=DIR" if "dataset.root=DIR" in path.read_text() and not known else ""
    found = []
    for overrides in itertools.product(*choices.values()):
        chosen = dict(override.split("=", 1) for override in overrides)
        groups = {name: {"name": chosen[name]} for name in ("model", "quant", "finetune") if name in chosen}
        # A recipe, a model and a fine-tune are called as their files are: a test sees to it.
        cell = OmegaConf.create({**groups, "cell": experiment.cell}).cell
        command = f"luqrun +experiment={table}/{scale} {' '.join(overrides)}{root}"
        found.append(Expected(cell.row, cell.column, int(chosen["seed"]), command))
    return found
