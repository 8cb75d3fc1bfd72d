"""The settings of a script that takes overrides as luqrun does, outside of a run."""

from __future__ import annotations

from collections.abc import Sequence

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore

from luqrun.cli.overrides import with_companions
from luqrun.cli.validation import to_config, validate
from luqrun.config import Config, conf_dir


def config_of(overrides: Sequence[str]) -> Config:
    """The validated config of `luqrun OVERRIDES`. Raises UserError."""
    ConfigStore.instance().store(name="schema", node=Config)
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = to_config(compose("config", with_companions(list(overrides))))
    validate(config)
    return config
