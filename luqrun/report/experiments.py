"""Which cells a table has: read from the experiments that fill it, conf/experiment/TABLE/SCALE.yaml and its parts."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

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
    "formats": "Formats: today's 4-bit schemes beside LUQ",
    "replications": "Replications: LUQ as others have coded it",
    "phases": "Last phases: what is in high precision at the end",
    "post_training": "Post-training: weights that the first recipe trained, evaluated with the second",
}
ROUNDING_TABLES = ("table1", "fig1a")  # by job=rounding; the others are of trainings, or of job=evaluate
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
    "formats": (None, "fp32"),
    "replications": (None, "fp32"),
    "phases": (None, "fp32_none"),
    "post_training": ("fp32", "fp32"),
}
# A table's rows for text are experiments of their own where their data lie elsewhere: table2/small_translation.
PARTS = ("", "_translation", "_question_answering")


@dataclass(frozen=True)
class Expected:
    """A run that a table wants: its cell, its seed, the command that makes it and that command's experiment."""

    row: str
    column: str
    seed: int
    command: str
    experiment: str


def check_tables(names: list[str]) -> None:
    """UserError for a name that is no table, with the known ones."""
    for name in names:
        if name not in TITLES:
            raise UserError(f"table {name} is not known; allowed: {', '.join(TITLES)}")


def experiments_of(table: str, scale: str) -> list[str]:
    """The experiments whose runs are of this table at this scale, such as table2/small_translation; [] for none."""
    found = [f"{table}/{scale}{part}" for part in PARTS]
    return [name for name in found if _file(name).is_file() and "hydra" in OmegaConf.load(_file(name))]


def expected(table: str, scale: str) -> list[Expected]:
    """The runs that all experiments of this table at this scale make; none where there is no such experiment."""
    return [wish for name in experiments_of(table, scale) for wish in expected_of(name)]


def expected_of(name: str, shared: Sequence[str] = ()) -> list[Expected]:
    """The runs that `luqrun -m +experiment=NAME` makes.

    shared: the overrides of all runs that there are; a model among them that the experiment has not replaces its own.
    A command that needs a folder, such as dataset.root, says DIR, where that is not among them.
    """
    experiment = OmegaConf.load(_file(name))
    params = OmegaConf.to_container(experiment.hydra.sweeper.params)
    choices = {key: [f"{key}={value}" for value in str(values).split(",")] for key, values in params.items()}
    own = [given for given in shared if given.startswith("model=")]
    if own and own[0] not in choices.get("model", own):
        choices["model"] = own
    needed = dict.fromkeys(re.findall(r"\s([\w.]+=)DIR\b", _file(name).read_text()))
    folders = "".join(f" {key}DIR" for key in needed if not any(given.startswith(key) for given in shared))
    found = []
    for overrides in itertools.product(*choices.values()):
        chosen = dict(override.split("=", 1) for override in overrides)
        groups = {key: {"name": chosen[key]} for key in ("model", "quant", "finetune") if key in chosen}
        # A recipe, a model and a fine-tune are called as their files are: a test sees to it.
        given = {key.removeprefix("cell."): value for key, value in chosen.items() if key.startswith("cell.")}
        cell = OmegaConf.create({**groups, "cell": OmegaConf.to_container(experiment.cell) | given}).cell
        command = f"luqrun +experiment={name} {' '.join(overrides)}{folders}"
        found.append(Expected(cell.row, cell.column, int(chosen["seed"]), command, name))
    return found


def _file(name: str) -> Path:
    return conf_dir() / "experiment" / f"{name}.yaml"
