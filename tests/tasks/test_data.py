"""Building data sets by name: the config's keys, the subset, the YAML files."""

from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

from luqrun import tasks
from luqrun.config import DatasetConfig, GlyphsConfig
from luqrun.errors import UserError
from luqrun.tasks.classification.data import NAMES, build_dataset
from luqrun.tasks.classification.task import Classification
from luqrun.tasks.question_answering.task import QuestionAnswering
from luqrun.tasks.subset import subset
from luqrun.tasks.translation.task import Translation

CONF = Path(__file__).parents[2] / "conf" / "dataset"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def glyphs(**changes) -> DatasetConfig:
    sizes = {key: changes.pop(key) for key in ("train_images", "val_images", "noise") if key in changes}
    drawing = GlyphsConfig(**({"train_images": 60, "val_images": 20} | sizes))
    return DatasetConfig(**({"name": "glyphs", "image_size": 8, "batch_size": 4, "glyphs": drawing} | changes))


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"name": "mnist"}, "dataset.name=mnist"),
        ({"image_size": 7}, "dataset.image_size=7"),
        ({"batch_size": 0}, "dataset.batch_size=0"),
        ({"batch_size": 61}, "dataset.batch_size=61"),
        ({"batch_size": 5, "limit": 4}, "dataset.batch_size=5"),
        ({"workers": -1}, "dataset.workers=-1"),
        ({"limit": 0}, "dataset.limit=0"),
        ({"limit": 61}, "dataset.limit=61"),
        ({"train_images": 0}, "dataset.glyphs.train_images=0"),
        ({"val_images": 0}, "dataset.glyphs.val_images=0"),
        ({"noise": -0.1}, "dataset.glyphs.noise=-0.1"),
        ({"max_length": 64}, "dataset.max_length=64 is not read by dataset=glyphs"),
        ({"examples": 64}, "dataset.examples=64"),
    ],
)
def test_a_wrong_value_names_its_key(changes, key):
    with pytest.raises(UserError, match=key):
        build_dataset(glyphs(**changes))


def test_an_unknown_name_lists_the_known():
    with pytest.raises(UserError, match=", ".join(NAMES)):
        build_dataset(glyphs(name="mnist"))


def test_subset_is_fixed_random_and_nested():
    small, large = subset(1000, 50, "images"), subset(1000, 200, "images")
    np.testing.assert_array_equal(small, subset(1000, 50, "images"))
    assert len(set(large.tolist())) == 200
    assert set(small.tolist()) < set(large.tolist())
    assert small.max() > 500  # not the first ones, which in class folders are all of one class
    np.testing.assert_array_equal(subset(7, None, "images"), np.arange(7))


def test_limit_keeps_images_with_their_labels():
    whole, part = build_dataset(glyphs()), build_dataset(glyphs(limit=10))
    assert (len(part.train), len(part.val)) == (10, 20)
    np.testing.assert_array_equal(part.train.labels, whole.train.labels[subset(60, 10, "images")])
    np.testing.assert_array_equal(part.train.images, whole.train.images[subset(60, 10, "images")])


@pytest.mark.parametrize("name", NAMES)
def test_each_yaml_fits_the_schema(name):
    text = (CONF / f"{name}.yaml").read_text()
    config = OmegaConf.merge(OmegaConf.structured(DatasetConfig), OmegaConf.create(text))
    assert config.name == name
    assert not OmegaConf.missing_keys(config)
    assert text.startswith("# ")
    assert f" dataset={name}" in text.splitlines()[0].partition(" luqrun")[2]


def test_there_is_a_yaml_for_each_name():
    assert {file.stem for file in CONF.glob("*.yaml")} == set(tasks.MODULES)


def test_the_metrics_of_all_tasks_are_known():
    classes = [Classification, QuestionAnswering, Translation]
    assert {each.__module__ for each in classes} == set(tasks.MODULES.values())
    own = {metric for each in classes for metric in each.metrics}
    tested = {metric.of_test for metric in Translation.metrics}  # it alone has test data
    assert sorted(metric.name for metric in own | tested) == sorted(tasks.METRICS)
