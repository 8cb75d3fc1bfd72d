"""What keeps the command line quick and its log readable, where Hydra and others are not by themselves."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.object_type import ObjectType

OURS = ("luqrun", "hydra")


def quieten_libraries(verbose: object) -> None:
    """hydra.verbose=true: luqrun's and Hydra's debugging messages, and not numba's 150,000 lines.

    hydra.verbose=[NAME, ...], which names loggers, stays as it is.
    """
    if verbose is True:
        logging.getLogger().setLevel(logging.INFO)
        for name in OURS:
            logging.getLogger(name).setLevel(logging.DEBUG)


@contextmanager
def quick_start() -> Iterator[None]:
    """In here Hydra starts sooner: without garbage collection, which a job turns on again, and with a list of groups
    for --help that takes a hundredth of the time: Hydra copies all that it knows for each look at one."""
    private = ConfigLoaderImpl.get_group_options

    def options(self, group_name, results_filter=ObjectType.CONFIG, config_name=None, overrides=None):
        if config_name is not None or overrides:
            return private(self, group_name, results_filter, config_name, overrides)
        return list(listed(self, group_name, results_filter))

    @cache
    def listed(loader, group_name: str, results_filter: ObjectType | None) -> list[str]:
        return loader.repository.get_group_options(group_name, results_filter)

    ConfigLoaderImpl.get_group_options = options
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        ConfigLoaderImpl.get_group_options = private
