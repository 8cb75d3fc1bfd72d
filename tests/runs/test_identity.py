"""Whose result a folder holds: one of other settings, data, processes or RESULTS is refused in a line, and no twin."""

import dataclasses
import json

import numpy as np
import pytest
import yaml
from PIL import Image
from running import tiny

from luqrun import RESULTS
from luqrun.config import DatasetConfig
from luqrun.errors import UserError
from luqrun.runs.folder import RunFolder, run_id
from luqrun.runs.identity import differs_from, refuse_another, refuse_other_settings
from luqrun.tasks.classification.data import build_dataset

RUN = {"status": "finished", "results": RESULTS, "world_sizes": [1], "data": {"digest": "", "root": None}}


def hold(path, config, run=None, summary=True, name=None) -> RunFolder:
    """A folder that holds a run of `config`."""
    folder = RunFolder(path / (name or run_id(config)))
    folder.path.mkdir(parents=True)
    (folder.path / "config.yaml").write_text(yaml.safe_dump(dataclasses.asdict(config)))
    folder.write_json("run.json", RUN if run is None else run)
    if summary:
        folder.write_json("summary.json", {"val/top1": 80.0})
    return folder


def refusal(function, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Settings


@pytest.mark.parametrize("state", ["finished", "diverged", "begun", "logged"])
def test_a_run_of_other_settings_is_named_with_both_values(tmp_path, state):
    folder = hold(tmp_path, tiny("quant=luq"), {**RUN, "status": state}, summary=state == "finished", name="mine")
    if state == "begun":
        folder.checkpoints.mkdir()
    if state == "logged":
        folder.append_metrics({"step": 20})
    refuse_other_settings(tiny("quant=luq", "study=other", "tracking.log_every=9"), folder)
    text = refusal(refuse_other_settings, tiny("quant=fp32"), folder)
    for words in (str(folder.path), "quant.name=luq", "quant.name=fp32", "hydra.run.dir", "hydra.sweep.subdir"):
        assert words in text
    assert "schedule.lr=0.1" in refusal(refuse_other_settings, tiny("quant=luq", "schedule.lr=0.2"), folder)
    assert "quant.gradient.samples=1" in refusal(
        refuse_other_settings, tiny("quant=luq", "quant.gradient.samples=2"), folder
    )


def test_a_measurement_is_not_a_training(tmp_path):
    folder = hold(tmp_path, tiny("job=rounding"), name="0")
    assert "job=rounding" in refusal(refuse_other_settings, tiny(), folder)
    assert "quant.name=luq" in refusal(refuse_other_settings, tiny("job=rounding", "quant=forward_sr"), folder)


def test_what_never_trained_a_step_is_nobodys(tmp_path):
    folder = hold(tmp_path, tiny("dataset.batch_size=999"), {**RUN, "status": "failed"}, summary=False, name="mine")
    refuse_other_settings(tiny(), folder)


def test_without_its_config_a_folder_is_known_by_its_name(tmp_path):
    named, other = hold(tmp_path, tiny()), hold(tmp_path, tiny(), name="mine")
    for folder, text in ((named, "- ["), (other, "3")):
        (folder.path / "config.yaml").write_text(text)
    refuse_other_settings(tiny(), named)
    assert "config.yaml cannot be read" in refusal(refuse_other_settings, tiny(), other)


# Numbers and processes


@pytest.mark.parametrize("status", ["finished", "diverged"])
def test_a_result_of_other_numbers_is_refused(tmp_path, status):
    for theirs, shown in ((..., "RESULTS 1"), (1, "RESULTS 1"), (RESULTS + 1, f"RESULTS {RESULTS + 1}"), ("x", "x")):
        run = {key: value for key, value in {**RUN, "results": theirs, "status": status}.items() if value is not ...}
        folder = hold(tmp_path / str(theirs), tiny(), run, summary=status == "finished")
        text = refusal(refuse_another, tiny(), folder)
        assert shown in text
        assert "study=NAME" in text
        assert "delete" in text
        assert "RESULTS" in differs_from(tiny())(run)


@pytest.mark.parametrize(
    ("sizes", "now", "words"),
    [
        ([1], 1, ""),
        ([2], 2, ""),
        ([2], 1, "by 2 processes, this run has 1"),
        ([1], 2, "by 1 process, this run has 2"),
        ([3, 1], 2, "by 3, then 1 processes, this run has 2"),
        (None, 1, "unknown number"),
    ],
)
def test_a_result_of_other_processes_is_refused(tmp_path, monkeypatch, sizes, now, words):
    monkeypatch.setenv("WORLD_SIZE", str(now))
    run = {**RUN, "world_sizes": sizes}
    folder = hold(tmp_path, tiny(), run)
    if words:
        assert words in refusal(refuse_another, tiny(), folder)
    else:
        assert refuse_another(tiny(), folder) == ""
    assert bool(differs_from(tiny())(run)) == bool(words)


def test_who_went_on_with_fewer_processes_is_shown_the_result_and_told_so(tmp_path):
    run = {**RUN, "world_sizes": [3, 1]}
    assert refuse_another(tiny(), hold(tmp_path, tiny(), run)) == " (trained by 3, then 1 processes)"
    assert differs_from(tiny())(run) == "by 3, then 1 processes"  # but it is no twin of a run of one


# Data


def images(root, classes="ab", count=3, seed=0):
    rng = np.random.default_rng(seed)
    for split in ("train", "val"):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                noise = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(noise).save(root / split / name / f"{number}.png")
    return root


def on(root, name="imagenet"):
    return dataclasses.replace(tiny(), dataset=DatasetConfig(name=name, root=str(root), image_size=16, batch_size=2))


def recorded(root) -> dict:
    """run.json of a run that was trained on the images in `root`."""
    return json.loads(json.dumps({**RUN, "data": dataclasses.asdict(build_dataset(on(root).dataset).found)}))


OTHERS = {
    "other classes": ({"classes": "ac"}, "other images or class names"),
    "more classes": ({"classes": "abc"}, "2 classes instead of 3"),
    "more images": ({"count": 4}, "6 training images instead of 8"),
    "other pixels": ({"seed": 1}, "other images"),
}


@pytest.mark.parametrize(("change", "words"), OTHERS.values(), ids=OTHERS)
def test_a_result_of_other_data_is_refused(tmp_path, change, words):
    mine, other = images(tmp_path / "mine"), images(tmp_path / "other", **change)
    run = recorded(mine)
    folder = hold(tmp_path, on(mine), run)
    assert run_id(on(other)) == run_id(on(mine))
    text = refusal(refuse_another, on(other), folder)
    assert words in text
    assert str(folder.path) in text
    assert words in differs_from(on(other))(run)
    mine.rename(tmp_path / "aside")  # other data in the same place
    other.rename(mine)
    assert words in refusal(refuse_another, on(mine), folder)


def test_the_same_data_elsewhere_are_the_same(tmp_path):
    run = recorded(images(tmp_path / "mine"))
    copy = images(tmp_path / "copy")
    folder = hold(tmp_path, on(copy), run)
    assert refuse_another(on(tmp_path / "mine"), folder) == ""
    assert refuse_another(on(copy), folder) == f" (with dataset.root={tmp_path / 'mine'})"
    assert differs_from(on(copy))(run) == ""


def test_data_that_are_gone_are_told_and_a_place_that_never_held_them_is_refused(tmp_path):
    run = recorded(images(tmp_path / "mine"))
    (tmp_path / "mine").rename(tmp_path / "aside")
    folder = hold(tmp_path, on(tmp_path / "mine"), run)
    assert "not there any more and were not compared" in refuse_another(on(tmp_path / "mine"), folder)
    assert "no such folder" in refusal(refuse_another, on(tmp_path / "nowhere"), folder)


def test_a_result_whose_data_are_not_known_is_no_twin(tmp_path):
    root, run = images(tmp_path / "mine"), {**RUN, "data": None}
    assert "data" in differs_from(on(root))(run)
    assert "whose data" in refusal(refuse_another, on(root), hold(tmp_path, on(root), run))
