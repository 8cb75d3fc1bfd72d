"""The YAML files: each opens with the command that runs it, that composes, and experiments make their tables."""

import dataclasses
import fnmatch
import re

import pytest
from experiment_jobs import (
    CONF,
    EXPERIMENTS,
    FILES,
    GROUPS,
    OPTIONS,
    SWEEPS,
    TEXT_MODELS,
    TEXTS,
    command,
    jobs,
    on_the_command_line,
    sweep,
    table_and_scale,
)
from hydra.errors import HydraException
from omegaconf import OmegaConf
from running import composed

from luqrun.cli.messages import one_line
from luqrun.cli.validation import to_config, validate
from luqrun.config import Config, FinetuneConfig
from luqrun.errors import UserError
from luqrun.quant.finetune import PHASES
from luqrun.quant.recipe import GEMMS
from luqrun.report import experiments
from luqrun.runs.identity import run_id
from luqrun.train.schedules import learning_rate


def test_the_groups_are_there():
    assert {name.split("/")[0] for name in OPTIONS} == set(GROUPS)
    assert {name.split("/")[0] for name in FILES} == {*GROUPS, "experiment", "scale", "config.yaml", "hydra"}
    phases = {f"finetune/{phase}{epochs}.yaml" for phase in PHASES for epochs in (1, 2, 3)}
    assert {"finetune/none.yaml", *phases} <= set(OPTIONS)


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_composes_and_its_own_command_uses_it(name):
    group, option = name.removesuffix(".yaml").split("/", 1)
    overrides = command(name)
    root = [given for given in overrides if given == "dataset.root=DIR" and group == "dataset"]
    alone = to_config(composed(f"{group}={option}", *root))
    if "text" not in (kind(alone.dataset.name), kind(alone.model.name)):  # which need each other
        validate(alone)
    if group != "schedule" and "/" not in option:
        assert getattr(alone, group).name == option
    assert f"{group}={option}" in overrides or is_default(group, option)
    validate(to_config(composed(*overrides)))


def kind(name: str) -> str:
    """What a data set or a network is for."""
    return "text" if name in (*TEXTS, *TEXT_MODELS) else "images"


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
    count = 12 if config.warmup_steps is None else 10 * config.warmup_steps // config.epochs
    rates = [learning_rate(config, step, count) for step in range(count * config.epochs)]
    assert all(0 <= rate <= config.lr * (1 + 1e-9) for rate in rates)
    assert max(rates) > 0.9 * config.lr
    assert rates[-1] < (0.4 if config.name == "inverse_sqrt" else 0.1) * config.lr


@pytest.mark.parametrize("number", [0, 1, 2, 3])
@pytest.mark.parametrize("phase", PHASES)
def test_fine_tune_options_and_the_rate_of_the_schedule(phase, number):
    option = "none" if number == 0 else f"{phase}{number}"
    config = to_config(composed(f"finetune={option}", "schedule.finetune_lr=0.007"))
    assert (config.finetune.epochs, config.finetune.lr_base) == (number, 0.007)
    assert to_config(composed(f"finetune={option}", "finetune.lr_base=0.1")).finetune.lr_base == 0.1
    if number:
        operands = {gemm: tuple(names) for gemm, names in vars(config.finetune.high_precision).items()}
        assert operands == dict.fromkeys(GEMMS, ()) | PHASES[phase]  # in Python and in the files alike


def is_of_text(name) -> bool:
    """Whether all its rows are; of table2/embedded some are."""
    return {config.dataset.name for config in jobs(name)} <= set(TEXTS)


def test_every_table_is_there_at_every_scale():
    assert {table for table, _ in map(table_and_scale, SWEEPS)} == set(experiments.TITLES)
    for table in experiments.TITLES:
        wanted = {"measured"} if table in ("table1", "fig1a") else {"embedded", "cifar", "cifar100", "paper"}
        wanted |= {"small"} if table in ("table2", "table3") else set()
        others = {"formats": {"embedded", "cifar"}, "replications": {"embedded"}, "phases": {"embedded"}}
        others["post_training"] = {"embedded", "cifar"}
        wanted = others.get(table, wanted)
        assert {scale for other, scale in map(table_and_scale, SWEEPS) if other == table} == wanted


def test_the_data_of_the_embedded_scale_follow_from_the_model():
    found = {config.model.name: config.dataset.name for config in jobs("experiment/table2/embedded.yaml")}
    images = dict.fromkeys(("resnet8", "mobilenet_tiny", "resnext8", "vit_tiny"), "glyphs")
    assert found == {**images, "transformer_tiny": "sentences", "bert_tiny": "facts"}
    for group in ("dataset", "schedule"):
        assert {path.stem for path in (CONF / group / "embedded").glob("*.yaml")} > set(found)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_is_valid_at_every_point_of_its_sweep(name):
    found = jobs(name)
    for config in found:
        validate(config)
        assert config.study != "default"
    assert len({run_id(config, {"weights": config.model.weights}) for config in found}) == len(found)


@pytest.mark.parametrize("scale", ["embedded", "cifar"])
def test_weights_are_evaluated_where_the_command_in_the_file_trains_them(scale):
    name = f"experiment/post_training/{scale}.yaml"
    line = (CONF / name).read_text().splitlines()[2]
    given = [text.replace("DIR", "/data") for text in line.partition(": luqrun -m ")[2].split()]
    recipes, seeds = (next(text for text in given if text.startswith(key)) for key in ("quant=", "seed="))
    trained = set()
    for quant in recipes.partition("=")[2].split(","):
        for seed in seeds.partition("=")[2].split(","):
            rest = [text for text in given if text not in (recipes, seeds)]
            config = to_config(composed(*rest, f"quant={quant}", f"seed={seed}"))
            trained.add(f"outputs/{config.study}/{run_id(config, {})}/checkpoints/last.pt")
    for config in jobs(name):
        assert len(fnmatch.filter(trained, config.model.weights)) == 1, config.model.weights


@pytest.mark.parametrize("name", [name for name in SWEEPS if table_and_scale(name)[1] in ("embedded", "measured")])
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
    expected = experiments.expected_of(name.removeprefix("experiment/").removesuffix(".yaml"))
    assert [(each.row, each.column, each.seed) for each in expected] == labels
    # The command that the report prints for a cell is the one that makes it.
    last = {key: values[-1] for key, values in sweep(name).items()}
    assert expected[-1].command.replace("DIR", "/data").split()[1:] == on_the_command_line(name, **last)


@pytest.mark.parametrize("name", SWEEPS)
def test_a_sweep_is_what_its_scale_promises(name):
    found, (table, scale) = jobs(name), table_and_scale(name)
    of_figure = table in ("fig1b", "fig1c", "fig5")
    names = {"embedded": "glyphs", "cifar": "cifar10", "cifar100": "cifar100"}
    names["paper"] = "cifar100" if of_figure else "imagenet"
    if scale != "measured":
        of_images = {config.dataset.name for config in found} - set(TEXTS)
        assert of_images == (set() if is_of_text(name) else {names[scale]})
        assert {config.dataset.root is None for config in found} == {scale == "embedded"}
        baseline = experiments.BASELINES[table]
        for row in {config.cell.row for config in found}:
            columns = [config.cell.column for config in found if config.cell.row == (baseline[0] or row)]
            assert (baseline[1] or columns[0]) in columns
    assert len({config.seed for config in found}) >= {
        "embedded": 5 if table in ("fig2", "table3") else 3,
        "small": 3,
    }.get(scale, 1)
    # Fine-tunes start from one checkpoint, and the run that makes it comes before them.
    tunes = "finetune" in sweep(name)
    assert {config.resume for config in found} == {"base" if tunes else "auto"}
    for at, config in enumerate(found):
        if tunes and config.finetune.epochs:
            alone = dataclasses.replace(config, finetune=FinetuneConfig(name="none"))
            assert run_id(alone, {}) in {run_id(earlier, {}) for earlier in found[:at]}


ON_CIFAR = sorted({table for table, scale in map(table_and_scale, SWEEPS) if scale == "cifar100"})


@pytest.mark.parametrize("table", ON_CIFAR)
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
    assert config.cell.scale == scale.partition("_")[0]
    assert config.finetune.epochs == 0


@pytest.mark.parametrize("group", ["model", "quant", "finetune"])
def test_a_part_is_called_as_its_file_is(group):
    # luqrun.report.experiments reads the rows and columns of a table from names of files.
    for path in (CONF / group).glob("*.yaml"):
        assert OmegaConf.load(path).name == path.stem


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("job=tune", ("job=tune", "train, evaluate, rounding")),
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
