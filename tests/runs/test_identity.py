"""Whose run a folder holds: one of other settings, data, processes or RESULTS is refused, or named, in a line."""

from dataclasses import asdict, replace

import numpy as np
import pytest
import yaml
from PIL import Image
from running import tiny

from luqrun import RESULTS
from luqrun.config import DatasetConfig
from luqrun.errors import UserError
from luqrun.runs.folder import RunFolder
from luqrun.runs.identity import (
    LAYOUT,
    differing_data,
    refuse_changed_data,
    refuse_other_run,
    run_id,
    runs_beside,
)
from luqrun.tasks import fingerprint_data

DATA = {"root": "/data", "classes": 3, "training_images": 9, "names_and_sizes": "0a"}  # a fingerprint
RUN = {"status": "finished", "layout": LAYOUT, "results": RESULTS, "world_sizes": [1], "data": {}}

# A folder that holds another run


def hold(path, config, run=None, summary=True, name=None) -> RunFolder:
    """A folder that holds a run of `config`."""
    folder = RunFolder(path / (name or run_id(config, {})))
    folder.path.mkdir(parents=True)
    (folder.path / "config.yaml").write_text(yaml.safe_dump(asdict(config)))
    folder.write_json("run.json", RUN if run is None else run)
    if summary:
        folder.write_json("summary.json", {"val/top1": 80.0})
    return folder


def refusal(config, folder, data=None) -> str:
    with pytest.raises(UserError) as caught:
        refuse_other_run(config, data or {}, folder)
    assert "\n" not in str(caught.value)
    assert str(folder.path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("state", ["finished", "diverged", "begun", "logged"])
def test_a_run_of_other_settings_is_named_with_both_values(tmp_path, state):
    folder = hold(tmp_path, tiny("quant=luq"), {**RUN, "status": state}, summary=state == "finished", name="mine")
    if state == "begun":
        folder.checkpoints.mkdir()
    if state == "logged":
        folder.append_metrics({"step": 20})
    refuse_other_run(tiny("quant=luq", "study=other", "tracking.log_every=9"), {}, folder)
    text = refusal(tiny("quant=fp32"), folder)
    for words in ("quant.name=luq", "quant.name=fp32", "hydra.run.dir", "hydra.sweep.subdir"):
        assert words in text
    assert "schedule.lr=0.1" in refusal(tiny("quant=luq", "schedule.lr=0.2"), folder)
    assert "quant.gradient.samples=1" in refusal(tiny("quant=luq", "quant.gradient.samples=2"), folder)


def test_a_measurement_is_not_a_training(tmp_path):
    folder = hold(tmp_path, tiny("job=rounding"), name="0")
    assert "job=rounding" in refusal(tiny(), folder)
    assert "quant.name=luq" in refusal(tiny("job=rounding", "quant=forward_sr"), folder)


def test_what_never_trained_a_step_is_nobodys(tmp_path):
    folder = hold(tmp_path, tiny("dataset.batch_size=999"), {**RUN, "status": "failed"}, summary=False, name="mine")
    refuse_other_run(tiny(), {}, folder)


def test_without_its_config_a_folder_is_known_by_its_name(tmp_path):
    named, other = hold(tmp_path, tiny()), hold(tmp_path, tiny(), name="mine")
    for folder, text in ((named, "- ["), (other, "3")):
        (folder.path / "config.yaml").write_text(text)
    refuse_other_run(tiny(), {}, named)
    assert "config.yaml is not a configuration" in refusal(tiny(), other)
    (named.path / "run.json").unlink()  # as a damaged one is to be
    refuse_other_run(tiny(), {}, named)
    other = hold(tmp_path, tiny(), name="another")
    (other.path / "run.json").unlink()
    assert "of which run.json is not there" in refusal(tiny(), other)


@pytest.mark.parametrize("status", ["finished", "diverged"])
@pytest.mark.parametrize("theirs", [..., 1, RESULTS + 1])
def test_a_result_of_other_numbers_is_refused(tmp_path, status, theirs):
    run = {key: value for key, value in {**RUN, "results": theirs, "status": status}.items() if value is not ...}
    text = refusal(tiny(), hold(tmp_path, tiny(), run, summary=status == "finished"))
    assert f"RESULTS {1 if theirs is ... else theirs} " in text
    assert "study=NAME" in text
    assert "delete" in text


@pytest.mark.parametrize(
    ("sizes", "now", "words"),
    [
        ([1], 1, ""),
        ([2], 2, ""),
        ([3, 1], 1, ""),  # resume=PATH, of a checkpoint of three
        ([2], 1, "by 2 processes, this one has 1"),
        ([1], 2, "by 1 process, this one has 2"),
        ([3, 1], 3, "by 1 process, this one has 3"),
        ([], 1, "unknown number"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_a_run_by_other_processes_is_refused(tmp_path, monkeypatch, sizes, now, words, finished):
    monkeypatch.setenv("WORLD_SIZE", str(now))
    folder = hold(tmp_path, tiny(), {**RUN, "world_sizes": sizes}, summary=finished, name="mine")
    folder.append_metrics({"step": 20})
    if words:
        assert words in refusal(tiny(), folder)
    else:
        refuse_other_run(tiny(), {}, folder)


# Data


def images(root, classes="ab", count=3, size=16):
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                noise = rng.integers(0, 256, (size, 16, 3), dtype=np.uint8)
                Image.fromarray(noise).save(root / split / name / f"{number}.png")
    return root


def on(root, name="imagenet"):
    return replace(tiny(), dataset=DatasetConfig(name=name, root=str(root), image_size=16, batch_size=2))


OTHERS = {
    "other classes": ({"classes": "ac"}, "other names and sizes"),
    "more classes": ({"classes": "abc"}, "2 classes instead of 3"),
    "more images": ({"count": 4}, "6 training images instead of 8"),
    "other sizes": ({"size": 17}, "other names and sizes"),
}


@pytest.mark.parametrize(("change", "words"), OTHERS.values(), ids=OTHERS)
def test_a_run_on_other_data_has_another_folder_and_is_refused_in_the_same(tmp_path, change, words):
    mine, other = images(tmp_path / "mine"), images(tmp_path / "other", **change)
    known, found = fingerprint_data(on(mine)), fingerprint_data(on(other))
    assert run_id(on(other), found) != run_id(on(mine), known)
    folder = hold(tmp_path, on(mine), {**RUN, "data": known})
    assert words in refusal(on(other), folder, found)
    with pytest.raises(UserError, match=rf"what is read has changed since this run began, .*{words}"):
        refuse_changed_data(folder, found)
    refuse_changed_data(folder, known)


def test_the_same_data_elsewhere_are_the_same(tmp_path):
    mine, copy = images(tmp_path / "mine"), images(tmp_path / "copy")
    data = fingerprint_data(on(mine))
    assert data["root"] == str(mine)
    folder = hold(tmp_path, on(mine), {**RUN, "data": data}, name="run")
    refuse_other_run(on(copy), fingerprint_data(on(copy)), folder)
    assert run_id(on(copy), fingerprint_data(on(copy))) == run_id(on(mine), data)


def test_a_relative_root_is_of_where_its_command_was_given(tmp_path, monkeypatch):
    images(tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    config = on("mine", name="folder")
    folder = hold(tmp_path, config, {**RUN, "data": fingerprint_data(config)}, name="run")
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    again = on("../mine", name="folder")
    refuse_other_run(again, fingerprint_data(again), folder)


@pytest.mark.parametrize("root", [None, "nowhere"])
def test_data_that_are_not_there_have_no_fingerprint_data(tmp_path, root):
    config = replace(tiny(), dataset=DatasetConfig(name="folder", root=root and str(tmp_path / root)))
    with pytest.raises(UserError, match=r"dataset\.root.*(not given|no such folder)"):
        fingerprint_data(config)


def test_what_follows_from_the_settings_has_no_fingerprint_data(tmp_path):
    assert fingerprint_data(tiny()) == fingerprint_data(replace(on(tmp_path), job="rounding")) == {}
    # An earlier luqrun recorded generated images with their counts, and without a root.
    assert differing_data({"root": None, "classes": 47, "digest": ""}, {}) == ""
    assert differing_data(None, {}) == ""


def test_a_result_whose_data_are_not_known_is_refused(tmp_path):
    assert "whose data" in refusal(tiny(), hold(tmp_path, tiny(), {**RUN, "data": None}), DATA)


# Runs beside


def test_runs_of_the_same_settings_beside_a_new_one_are_named(tmp_path):
    ours = tmp_path / run_id(tiny(), {})
    hold(tmp_path, tiny(), name=ours.name)
    assert runs_beside(tiny(), {}, ours) == ""
    start = ours.name[:-8]
    hold(tmp_path, tiny("schedule.lr=0.3"), {**RUN, "results": 1}, name=f"{start}00000000")  # of other settings
    hold(tmp_path, tiny(), {**RUN, "results": 1}, name=f"{start}00000001")
    two = hold(tmp_path, tiny("study=x"), {**RUN, "world_sizes": [2], "status": "failed"}, name=f"{start}00000002")
    two.checkpoints.mkdir()
    (two.checkpoints / "last.pt").touch()
    earlier = hold(tmp_path, tiny(), {name: RUN[name] for name in RUN if name != "layout"}, name=f"{start}00000003")
    config = yaml.safe_load((earlier.path / "config.yaml").read_text())
    del config["seed"], config["quant"]["skip"]
    (earlier.path / "config.yaml").write_text(yaml.safe_dump({**config, "old": 3}))  # another schema
    earlier.checkpoints.mkdir()
    (earlier.checkpoints / "last.pt").touch()
    for name, text in (("00000004", "[1]"), ("00000005", "{")):
        (hold(tmp_path, tiny(), name=start + name).path / "run.json").write_text(text)
    line = runs_beside(tiny(), {}, ours)
    assert "\n" not in line
    assert line.startswith(f"of the same settings, beside this run: {tmp_path / start}00000001, a run of RESULTS 1 (")
    last = f"resume={two.checkpoints}/last.pt"
    assert f"{two.path}, a run by 2 processes, this one has 1, whose last checkpoint {last} takes; " in line
    assert f"{earlier.path}, a run of an earlier luqrun, which named its folder otherwise. Nothing" in line
    for number in (0, 4, 5):
        assert f"0000000{number}" not in line


def test_of_many_runs_beside_three_are_named(tmp_path):
    ours = tmp_path / run_id(tiny(), {})
    for number in range(5):
        hold(tmp_path, tiny(), {**RUN, "results": 1}, name=f"{ours.name[:-8]}0000000{number}")
    line = runs_beside(tiny(), {}, ours)
    assert (line.count("RESULTS 1"), "; and 2 more. " in line) == (3, True)


def test_of_runs_from_weights_those_of_the_same_file_with_another_content_are_named(tmp_path):
    def hold_one(number, file, content, **more):
        data = {"weights": content} if content else {}
        name = f"{ours.name[:-8]}0000000{number}"
        return hold(tmp_path, tiny(*file), {**RUN, "data": data, **more}, name=name).path

    file = ("model.weights=a.pt",)
    ours = tmp_path / run_id(tiny(*file), {"weights": "1"})
    changed = hold_one(1, file, "0")
    hold_one(2, ("model.weights=b.pt",), "2")
    hold_one(3, (), None)
    copied = hold_one(4, ("model.weights=copy-of-a.pt",), "1", results=1)
    line = runs_beside(tiny(*file), {"weights": "1"}, ours)
    assert f"{changed}, a run of other data: other weights; {copied}, a run of RESULTS 1 (" in line
    assert "00000002" not in line
    assert "00000003" not in line
