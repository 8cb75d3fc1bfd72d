"""For the tests of conf/: the YAML files, their commands, and the runs of each experiment."""

import dataclasses
import functools
import itertools
import re

from omegaconf import OmegaConf
from running import composed

from luqrun.cli.validation import to_config
from luqrun.config import CellConfig, Config, conf_dir
from luqrun.report import experiments

CONF = conf_dir()
TEXTS = ("sentences", "parallel", "multi30k", "wmt14", "facts", "squad")
TEXT_MODELS = ("transformer_tiny", "transformer_base", "bert", "bert_tiny")
GROUPS = ("model", "dataset", "quant", "schedule", "finetune")
FILES = sorted(str(path.relative_to(CONF)) for path in CONF.rglob("*.yaml"))
OPTIONS = [name for name in FILES if name.split("/")[0] in GROUPS]
EXPERIMENTS = [name for name in FILES if name.startswith("experiment/")]
# Those that fill a table of the report: of hardware/paper scripts/hardware.py makes a page.
SWEEPS = [name for name in EXPERIMENTS if {"sweeper:", "cell:"} <= set((CONF / name).read_text().split())]


def command(name) -> list[str]:
    """The overrides of the command in the file's opening comment, on this machine."""
    lines = [line for line in (CONF / name).read_text().splitlines() if not line.startswith("# @package")]
    assert lines[0].startswith("# ")
    found = re.search(r"[.:]\s+luqrun((?: [\w./+-]+=\S+| -m)*)$", lines[0])
    assert found, f"{name}: the first line does not end in a luqrun command"
    return found[1].split()


def sweep(name) -> dict[str, list[str]]:
    """What an experiment sweeps over: key -> values, in the order in which Hydra varies them; {} for one run."""
    params = OmegaConf.select(OmegaConf.load(CONF / name), "hydra.sweeper.params") or {}
    return {key: str(values).split(",") for key, values in params.items()}


def on_the_command_line(name, **chosen) -> list[str]:
    """The overrides of an experiment's command, and of one point of its sweep."""
    overrides = [text.replace("DIR", "/data") for text in command(name) if text != "-m"]
    assert overrides[0] == "+" + name.removesuffix(".yaml").replace("/", "=", 1)
    return [overrides[0], *(f"{key}={value}" for key, value in chosen.items()), *overrides[1:]]


@functools.cache
def part(group, option):
    """An option of quant or finetune, as it stands in a Config."""
    return getattr(to_config(composed(f"{group}={option}")), group)


@functools.cache
def jobs(name) -> list[Config]:
    """The configs of an experiment: one, or all of its sweep, in order.

    Hydra takes a fifth of a second for one. So it composes, for each model, the last point of the sweep, and the other
    recipes, fine-tunes and seeds are put in their places.
    """
    made, found = {}, []
    last = {key: values[-1] for key, values in sweep(name).items()}
    for point in itertools.product(*sweep(name).values()):
        chosen = dict(zip(sweep(name), point, strict=True))
        model = {key: value for key, value in chosen.items() if key == "model"}
        if str(model) not in made:
            plain = composed(*on_the_command_line(name, **{**last, **model}))
            made[str(model)] = to_config(plain), OmegaConf.to_container(plain, resolve=False)["cell"]
        config, cell = made[str(model)]
        changed = {"seed": int(chosen["seed"]), "quant": part("quant", chosen["quant"])} if chosen else {}
        if "finetune" in chosen:
            finetune = part("finetune", chosen["finetune"])
            changed["finetune"] = dataclasses.replace(finetune, lr_base=config.schedule.finetune_lr)
        config = dataclasses.replace(config, **changed)
        names = {group: {"name": getattr(config, group).name} for group in ("model", "quant", "finetune")}
        given = {key.removeprefix("cell."): value for key, value in chosen.items() if key.startswith("cell.")}
        resolved = OmegaConf.to_container(OmegaConf.create({**names, "cell": {**cell, **given}}), resolve=True)
        config.cell = CellConfig(**resolved["cell"])
        if config.job == "evaluate":  # which weights follows from the row and the seed
            weights = re.sub(r"-\w+-seed\d+-", f"-{config.cell.row}-seed{config.seed}-", config.model.weights)
            config.model = dataclasses.replace(config.model, weights=weights)
        found.append(config)
    return found


def table_and_scale(name) -> tuple[str, str]:
    """Of the cells that an experiment fills: those of table2/small_translation are of the scale small."""
    table, scale = name.removesuffix(".yaml").split("/")[1:]
    for part in filter(None, experiments.PARTS):
        scale = scale.removesuffix(part)
    return table, scale
