"""The YAML files: each opens with the command that runs it, that command composes, and an experiment trains."""

import itertools
import re

import pytest
import torch
from hydra import compose, initialize_config_dir
from PIL import Image
from running import composed, quiet_machine

from luqrun import trainer
from luqrun.config import Config, conf_dir
from luqrun.run_folder import RunFolder
from luqrun.schedules import learning_rate
from luqrun.validate import to_config, validate

CONF = conf_dir()
GROUPS = ("model", "dataset", "quant", "schedule", "finetune")
FILES = sorted(str(path.relative_to(CONF)) for path in CONF.rglob("*.yaml"))
OPTIONS = [name for name in FILES if name.split("/")[0] in GROUPS]
EXPERIMENTS = [name for name in FILES if name.startswith("experiment/")]


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


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_composes_and_its_own_command_uses_it(name):
    group, option = name.removesuffix(".yaml").split("/")
    config = to_config(composed(f"{group}={option}", *(["dataset.root=DIR"] if group == "dataset" else [])))
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


def test_every_option_that_hydra_lists_is_a_file_of_ours():
    config = composed()
    assert set(config) == set(Config.__dataclass_fields__)


@pytest.mark.parametrize("name", [name for name in OPTIONS if name.startswith("schedule/")])
def test_a_schedule_has_a_finite_rate_in_every_step(name):
    config = to_config(composed(f"schedule={name.split('/')[1].removesuffix('.yaml')}")).schedule
    rates = [learning_rate(config, step, 3) for step in range(3 * config.epochs)]
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
    config.dataset.batch_size, config.dataset.workers, config.dataset.limit = 2, 0, 2
    config.schedule.accumulate, config.schedule.warmup_epochs, config.device = 1, 0.0, "cpu"
    if config.dataset.name == "glyphs":
        config.dataset.glyphs.train_images = config.dataset.glyphs.val_images = 2
    else:
        config.dataset.name, config.dataset.root, config.dataset.image_size = "folder", str(root), 16
    return config


def jobs(name) -> list[Config]:
    """The configs of an experiment: one, or all of its sweep."""
    overrides = [text.replace("DIR", "/data") for text in command(name) if text != "-m"]
    assert overrides[0] == "+" + name.removesuffix(".yaml").replace("/", "=", 1)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        hydra = compose("config", overrides, return_hydra_config=True).hydra
    params = hydra.sweeper.params or {}
    values = [[f"{key}={value}" for value in str(text).split(",")] for key, text in params.items()]
    return [to_config(composed(*overrides, *point)) for point in itertools.product(*values)]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_composes_and_trains_one_step(name, images, tmp_path):
    found = jobs(name)
    tried = set()
    for config in found:
        validate(config)
        assert config.study != "default"
        parts = config.model.name, str(config.quant), config.precision
        if parts in tried:
            continue
        tried.add(parts)
        with quiet_machine(tmp_path):
            run = trainer.Trainer(shrunk(config, images), RunFolder(tmp_path), torch.device("cpu"))
            run.train_epoch(0)
            assert run.progress["step"] == 1
            assert run.evaluate()["val/loss"] > 0
            run.tracker.close()


def test_numbers_from_memory_are_marked():
    for name in ("schedule/step", "schedule/cosine", "schedule/adamw_cosine", "quant/luq_hindsight"):
        assert "not verified against the paper" in (CONF / f"{name}.yaml").read_text()
