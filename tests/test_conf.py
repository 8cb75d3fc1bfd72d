"""The YAML files: each opens with the command that runs it, that composes, and experiments make their tables."""

import copy
import dataclasses
import functools
import itertools
import re

import pytest
import torch
from hydra.errors import HydraException
from omegaconf import OmegaConf
from PIL import Image
from running import composed, quiet_machine

from luqrun.cli.messages import one_line
from luqrun.cli.validation import to_config, validate
from luqrun.config import CellConfig, Config, FinetuneConfig, conf_dir
from luqrun.errors import UserError
from luqrun.report import experiments
from luqrun.runs.folder import RunFolder
from luqrun.runs.identity import run_id
from luqrun.train import trainer
from luqrun.train.evaluation import evaluate
from luqrun.train.schedules import learning_rate

CONF = conf_dir()
GROUPS = ("model", "dataset", "quant", "schedule", "finetune")
FILES = sorted(str(path.relative_to(CONF)) for path in CONF.rglob("*.yaml"))
OPTIONS = [name for name in FILES if name.split("/")[0] in GROUPS]
EXPERIMENTS = [name for name in FILES if name.startswith("experiment/")]
SWEEPS = [name for name in EXPERIMENTS if "sweeper:" in (CONF / name).read_text()]


def command(name) -> list[str]:
    """The overrides of the command in the file's opening comment, on this machine."""
    lines = [line for line in (CONF / name).read_text().splitlines() if not line.startswith("# @package")]
    assert lines[0].startswith("# ")
    found = re.search(r"[.:]\s+luqrun((?: [\w./+-]+=\S+| -m)*)$", lines[0])
    assert found, f"{name}: the first line does not end in a luqrun command"
    return found[1].split()


def test_the_groups_are_there():
    assert {name.split("/")[0] for name in OPTIONS} == set(GROUPS)
    assert {name.split("/")[0] for name in FILES} == {*GROUPS, "experiment", "scale", "config.yaml", "hydra"}
    assert {f"finetune/{name}.yaml" for name in ("none", "fnt1", "fnt2", "fnt3")} <= set(OPTIONS)


# The default model and data set are of images.
WITH = {"dataset=squad": ["model=bert"], "dataset=facts": ["model=bert_tiny"]}
WITH |= {f"model={name}": ["dataset=facts"] for name in ("bert", "bert_tiny")}


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_composes_and_its_own_command_uses_it(name):
    group, option = name.removesuffix(".yaml").split("/", 1)
    others = list(WITH.get(f"{group}={option}", []))
    if group == "dataset" and option not in ("glyphs", "facts"):
        others.append("dataset.root=DIR")
    config = to_config(composed(f"{group}={option}", *others))
    validate(config)
    if group != "schedule":
        assert getattr(config, group).name == option
    overrides = command(name)
    assert f"{group}={option}" in overrides or is_default(group, option)
    validate(to_config(composed(*overrides)))


def is_default(group, option):
    return to_config(composed(f"{group}={option}")) == to_config(composed())


def test_the_default_is_the_contract():
    config = to_config(composed())
    names = [getattr(config, group).name for group in GROUPS]
    assert names == ["resnet8", "glyphs", "luq", "onecycle", "fnt3"]
    assert config.tracking == Config().tracking
    assert (config.seed, config.device, config.precision, config.study) == (0, "auto", "fp32", "default")
    assert command("config.yaml") == []


@pytest.mark.parametrize("name", [name for name in FILES if re.match("hydra/(launcher|sweeper)/", name)])
def test_a_launcher_or_sweeper_says_its_command_and_composes(name):
    extra = "hydra_plugins.hydra_submitit_launcher" if "launcher" in name else "hydra_plugins.hydra_optuna_sweeper"
    pytest.importorskip(extra, reason="the extras slurm and sweep are not installed")
    option = "=".join(name.removesuffix(".yaml").rsplit("/", 1))
    assert command(name) == ["-m", option]
    validate(to_config(composed(option)))


def test_every_option_that_hydra_lists_is_a_file_of_ours():
    config = composed()
    assert set(config) == set(Config.__dataclass_fields__)


@pytest.mark.parametrize("name", [name for name in OPTIONS if name.startswith("schedule/")])
def test_a_schedule_has_a_finite_rate_in_every_step(name):
    config = to_config(composed(name.removesuffix(".yaml").replace("/", "=", 1))).schedule
    rates = [learning_rate(config, step, 10) for step in range(10 * config.epochs)]
    assert all(0 <= rate <= config.lr * (1 + 1e-9) for rate in rates)
    assert max(rates) > 0.9 * config.lr
    assert rates[-1] < 0.1 * config.lr


@pytest.mark.parametrize("number", [0, 1, 2, 3])
def test_fine_tune_options_and_the_rate_of_the_schedule(number):
    option = "none" if number == 0 else f"fnt{number}"
    config = to_config(composed(f"finetune={option}", "schedule.finetune_lr=0.007"))
    assert (config.finetune.epochs, config.finetune.lr_base) == (number, 0.007)
    assert to_config(composed(f"finetune={option}", "finetune.lr_base=0.1")).finetune.lr_base == 0.1


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two classes of two training images and one validation image, as ImageNet and class folders lie on disk."""
    root = tmp_path_factory.mktemp("images")
    for split, count in (("train", 2), ("val", 1)):
        for label in ("n01", "n02"):
            (root / split / label).mkdir(parents=True)
            for number in range(count):
                Image.effect_noise((40, 36), 60 + number).convert("RGB").save(root / split / label / f"{number}.JPEG")
    return root


def shrunk(config: Config, root) -> Config:
    """The same experiment on stand-in data small enough for a test: one step of two images, and an evaluation."""
    config = copy.deepcopy(config)
    config.dataset.batch_size, config.dataset.workers, config.dataset.limit = 2, 0, 2
    config.schedule.accumulate, config.schedule.warmup_epochs, config.device = 1, 0.0, "cpu"
    config.schedule.lr = 1e-4  # a step on two images must not diverge
    if config.dataset.name == "glyphs":
        config.dataset.glyphs.train_images = config.dataset.glyphs.val_images = 2
    else:
        config.dataset.name, config.dataset.root, config.dataset.image_size = "folder", str(root), 16
    return config


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
        config.cell = CellConfig(
            **OmegaConf.to_container(OmegaConf.create({**names, "cell": cell}), resolve=True)["cell"]
        )
        found.append(config)
    return found


def table_and_scale(name) -> tuple[str, str]:
    return tuple(name.removesuffix(".yaml").split("/")[1:])


def test_every_table_is_there_at_every_scale():
    assert {table for table, _ in map(table_and_scale, SWEEPS)} == set(experiments.TITLES)
    for table in experiments.TITLES:
        wanted = {"measured"} if table in ("table1", "fig1a") else {"glyphs", "cifar", "cifar100", "paper"}
        assert {scale for other, scale in map(table_and_scale, SWEEPS) if other == table} == wanted


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_is_valid_at_every_point_of_its_sweep(name):
    found = jobs(name)
    for config in found:
        validate(config)
        assert config.study != "default"
    assert len({run_id(config, {}) for config in found}) == len(found)


@pytest.mark.parametrize("name", [name for name in SWEEPS if table_and_scale(name)[1] in ("glyphs", "measured")])
def test_what_hydra_makes_of_the_first_point_is_what_was_put_together(name):
    first = {key: values[0] for key, values in sweep(name).items()}
    assert to_config(composed(*on_the_command_line(name, **first))) == jobs(name)[0]


@pytest.mark.parametrize("name", SWEEPS)
def test_a_run_says_which_table_row_and_column_it_is(name):
    found, (table, scale) = jobs(name), table_and_scale(name)
    assert command(name)[0] == "-m"
    for config in found:
        assert (config.cell.table, config.cell.scale) == (table, scale)
        assert (config.study, config.reuse) == (f"{scale}/{table}", True)
    labels = [(config.cell.row, config.cell.column, config.seed) for config in found]
    assert len(set(labels)) == len(labels)
    expected = experiments.expected(table, scale)
    assert [(each.row, each.column, each.seed) for each in expected] == labels
    # The command that the report prints for a cell is the one that makes it.
    last = {key: values[-1] for key, values in sweep(name).items()}
    assert expected[-1].command.replace("DIR", "/data").split()[1:] == on_the_command_line(name, **last)


@pytest.mark.parametrize("name", SWEEPS)
def test_a_sweep_is_what_its_scale_promises(name):
    found, (table, scale) = jobs(name), table_and_scale(name)
    of_figure = table in ("fig1b", "fig1c", "fig5")
    names = {"glyphs": "glyphs", "cifar": "cifar10", "cifar100": "cifar100"}
    names["paper"] = "cifar100" if of_figure else "imagenet"
    if scale in names:
        assert {config.dataset.name for config in found} == {names[scale]}
        assert (found[0].dataset.root is None) == (scale == "glyphs")
        baseline = experiments.BASELINES[table]
        for row in {config.cell.row for config in found}:
            columns = [config.cell.column for config in found if config.cell.row == (baseline[0] or row)]
            assert (baseline[1] or columns[0]) in columns
    assert len({config.seed for config in found}) >= {"glyphs": 5 if table in ("fig2", "table3") else 3}.get(scale, 1)
    # Fine-tunes start from one checkpoint, and the run that makes it comes before them.
    tunes = "finetune" in sweep(name)
    assert {config.resume for config in found} == {"base" if tunes else "auto"}
    for at, config in enumerate(found):
        if tunes and config.finetune.epochs:
            alone = dataclasses.replace(config, finetune=FinetuneConfig(name="none"))
            assert run_id(alone, {}) in {run_id(earlier, {}) for earlier in found[:at]}


@pytest.mark.parametrize("table", sorted({table for table, scale in map(table_and_scale, SWEEPS) if scale == "cifar"}))
def test_cifar_100_is_the_same_sweep_in_a_study_of_its_own(table):
    ten, hundred = (jobs(f"experiment/{table}/{scale}.yaml") for scale in ("cifar", "cifar100"))
    for one, other in zip(ten, hundred, strict=True):
        assert (one.study, other.study) == (f"cifar/{table}", f"cifar100/{table}")
        again = dataclasses.replace(other, study=one.study)
        again.dataset = dataclasses.replace(other.dataset, name="cifar10")
        again.cell = dataclasses.replace(other.cell, scale="cifar")
        assert again == one


def test_the_contract_s_command_is_a_run_of_table_2():
    (found,) = jobs("experiment/table2/resnet50_luq.yaml")
    points = jobs("experiment/table2/paper.yaml")
    assert [each for each in points if (each.model.name, each.quant.name) == ("resnet50", "luq")] == [found]


def test_at_the_papers_scale_each_model_brings_its_schedule():
    schedules = {config.model.name: config.schedule for config in jobs("experiment/table2/paper.yaml")}
    assert {model: (each.name, each.optimizer, each.epochs) for model, each in schedules.items()} == {
        **dict.fromkeys(["resnet18", "resnet50", "resnext50_32x4d"], ("step", "sgd", 90)),
        "mobilenet_v2": ("cosine", "sgd", 150),
        "vit_b_16": ("cosine", "adamw", 300),
    }


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("scale/")])
def test_a_scale_is_one_word_on_the_command_line(name):
    scale = name.split("/")[1].removesuffix(".yaml")
    overrides = [text.replace("DIR", "/data") for text in command(name)]
    assert overrides[0] == f"+scale={scale}"
    config = to_config(composed(*overrides))
    validate(config)
    assert config.cell.scale == scale.removesuffix("_cifar100")
    assert config.finetune.epochs == 0


@pytest.mark.parametrize("group", ["model", "quant", "finetune"])
def test_a_part_is_called_as_its_file_is(group):
    # luqrun.report.experiments reads the rows and columns of a table from names of files.
    for path in (CONF / group).glob("*.yaml"):
        assert OmegaConf.load(path).name == path.stem


def one_step(config, images, path) -> None:
    with quiet_machine(path):
        run = trainer.Trainer(shrunk(config, images), RunFolder(path), torch.device("cpu"))
        try:
            run.train_epoch(0)
            assert run.progress["step"] == 1
            assert evaluate(run)["val/loss"] > 0
        finally:
            run.tracker.close()


def each(names, key) -> list[str]:
    return sorted({value for name in names for value in sweep(name).get(key, [])})


# Of the recipes that differ in the number of samples alone, the first.
@pytest.mark.parametrize("recipe", [name for name in each(SWEEPS, "quant") if not re.search("(4|8|16)$", name)])
def test_a_recipe_of_the_experiments_trains_a_step(recipe, images, tmp_path):
    one_step(dataclasses.replace(to_config(composed("finetune=none")), quant=part("quant", recipe)), images, tmp_path)


# Of the large ones, those that have no small twin.
@pytest.mark.parametrize("model", sorted({*each(SWEEPS, "model")} - {"vit_b_16", "resnext50_32x4d", "mobilenet_v2"}))
def test_a_model_of_the_experiments_trains_a_step(model, images, tmp_path):
    runs = [*jobs("experiment/table2/glyphs.yaml"), *jobs("experiment/table2/paper.yaml")]
    one_step(
        next(config for config in runs if (config.model.name, config.quant.name) == (model, "luq")), images, tmp_path
    )


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("job=tune", ("job=tune", "train, rounding")),
        ("reuse=maybe", ("reuse", "maybe")),
        ("cell.tabel=fig2", ("cell.tabel", "cell.table")),
        ("quant.gradient.pow2_scale=both", ("quant.gradient.pow2_scale", "both")),
        ("quant.gradient.redraw_every=0.5", ("quant.gradient.redraw_every", "0.5")),
        ("quant.weight.redraw_every=2", ("quant.weight.redraw_every", "quant.gradient.redraw_every")),
    ],
)
def test_a_mistake_names_its_key(override, words):
    with pytest.raises((UserError, HydraException)) as mistake:
        validate(to_config(composed(override)))
    line = one_line(mistake.value)
    assert [word for word in words if word not in line] == [], line
    assert "\n" not in line


def test_numbers_from_memory_are_marked():
    for name in ("schedule/step", "schedule/cosine", "schedule/adamw_cosine", "schedule/squad", "quant/luq_hindsight"):
        assert "not verified against the paper" in (CONF / f"{name}.yaml").read_text()
