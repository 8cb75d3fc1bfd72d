"""A step of each recipe and each network for images that the experiments train, on stand-in data."""

import copy
import dataclasses
import re

import pytest
import torch
from experiment_jobs import SWEEPS, TEXT_MODELS, jobs, part, sweep
from PIL import Image
from running import composed, quiet_machine

from luqrun.cli.validation import to_config
from luqrun.config import Config
from luqrun.runs.folder import RunFolder
from luqrun.train import trainer
from luqrun.train.evaluation import evaluate


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


# Of the large ones, those that have no small twin. Those for text are trained in tests/tasks.
UNTRAINED = {"vit_b_16", "resnext50_32x4d", "mobilenet_v2", *TEXT_MODELS}


@pytest.mark.parametrize("model", sorted({*each(SWEEPS, "model")} - UNTRAINED))
def test_a_model_of_the_experiments_trains_a_step(model, images, tmp_path):
    runs = [*jobs("experiment/table2/embedded.yaml"), *jobs("experiment/table2/paper.yaml")]
    one_step(
        next(config for config in runs if (config.model.name, config.quant.name) == (model, "luq")), images, tmp_path
    )
