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
        with of_hydra.groups_listed_once():
            assert loader.get_group_options("quant") == expected == ["fp32", "luq"]
            assert ConfigLoaderImpl.get_group_options is not private
    assert ConfigLoaderImpl.get_group_options is private
