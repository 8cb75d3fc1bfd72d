"""Hydra's interfaces that it does not promise: these tests say what broke when Hydra changes."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.global_hydra import GlobalHydra
from hydra.plugins.launcher import Launcher

from luqrun.internals import of_hydra


def test_the_parser_tells_options_from_overrides():
    options, _ = of_hydra.args_parser().parse_known_args(["-m", "seed=0,1", "--config-dir", "mine", "quant=luq"])
    assert (options.multirun, options.config_dir) == (True, "mine")
    assert "seed=0,1" in options.overrides


def test_hydras_own_launcher_is_told_from_others():
    assert of_hydra.ships_with_hydra(BasicLauncher)
    assert not of_hydra.ships_with_hydra(type("Mine", (Launcher,), {"__module__": "mine"}))


def read(folder: Path, name: str):
    with initialize_config_dir(str(folder), version_base="1.3"):
        compose(name)


def test_the_file_that_cannot_be_read_is_found(tmp_path):
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    with pytest.raises(Exception) as raised:  # noqa: PT011 PyYAML's, or Hydra's around it
        read(tmp_path, "broken")
    assert of_hydra.read_when_raised(raised.value) == (tmp_path / "broken.yaml", None)


def test_the_config_whose_defaults_are_wrong_is_found(tmp_path):
    (tmp_path / "main.yaml").write_text("defaults: 3\n")
    with pytest.raises(ValueError, match="defaults") as raised:
        read(tmp_path, "main")
    assert of_hydra.read_when_raised(raised.value) == (None, "main")
    assert of_hydra.read_when_raised(ValueError("no frames")) == (None, None)


def test_groups_are_listed_as_hydra_lists_them(tmp_path):
    for path in ("quant/luq.yaml", "quant/fp32.yaml", "main.yaml"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text("name: x\n")
    private = ConfigLoaderImpl.get_group_options
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        expected = loader.get_group_options("quant")
        with of_hydra.read_once():
            assert loader.get_group_options("quant") == expected == ["fp32", "luq"]
            assert ConfigLoaderImpl.get_group_options is not private
    assert ConfigLoaderImpl.get_group_options is private


@pytest.fixture
def folder(tmp_path):
    """A main configuration with a group of two recipes."""
    files = {
        "main": "defaults: [_self_, quant: luq]\nseed: 0\nrun: {steps: 1}\n",
        "quant/luq": "bits: 4\n",
        "quant/fp32": "bits: 32\n",
    }
    files["scale/small"] = "# @package _global_\nrun: {steps: 2}\n"
    for name, text in files.items():
        path = tmp_path / f"{name}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return tmp_path


def composed(folder: Path, *jobs) -> list:
    """What Hydra makes of the main configuration, for each job's overrides, in one process."""
    with initialize_config_dir(str(folder), version_base="1.3"):
        return [compose("main", list(job)) for job in jobs]


JOBS = (["+scale=small"], ["seed=1"], ["quant=fp32"], ["quant.bits=3"], [], ["+quant.more=1"], ["~quant"], [])


def test_jobs_are_composed_as_hydra_composes_them(folder):
    expected = composed(folder, *JOBS)
    with of_hydra.read_once():
        assert composed(folder, *JOBS) == expected
    assert composed(folder, *JOBS) == expected


def test_each_file_is_read_once_and_each_folder_has_its_own(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    (other / "main.yaml").write_text("seed: 7\n")
    with of_hydra.read_once():
        composed(folder, [])
        for path in folder.rglob("*.yaml"):
            path.write_text("changed: true\n")
        assert composed(folder, ["seed=3"]) == [{"quant": {"bits": 4}, "run": {"steps": 1}, "seed": 3}]
        assert composed(other, []) == [{"seed": 7}]
    assert composed(folder, []) == [{"changed": True}]


def test_few_combinations_are_kept(folder, monkeypatch):
    monkeypatch.setattr(of_hydra, "COMPOSED", 1)
    jobs = (["quant=luq"], ["quant=fp32"]) * 2
    with of_hydra.read_once():
        assert [job.quant.bits for job in composed(folder, *jobs)] == [4, 32, 4, 32]
