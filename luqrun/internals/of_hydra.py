"""What luqrun asks of Hydra through interfaces that it does not promise; test_of_hydra.py probes each."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import traceback
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from hydra._internal import config_loader_impl
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import CachingConfigRepository, ConfigRepository
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.config_loader import ConfigLoader
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig

_READER = "hydra._internal.core_plugins.file_config_source"
_REPOSITORY = "hydra._internal.config_repository"
COMPOSED = 64  # combinations of files that are kept composed


def args_parser() -> ArgumentParser:
    """The parser of Hydra's own options, whose `overrides` are the rest of a command line."""
    return get_args_parser()


def ships_with_hydra(plugin: type) -> bool:
    """Whether a launcher or sweeper is Hydra's own, which runs the jobs in this process."""
    return plugin.__module__.startswith("hydra._internal")


def grid(config: DictConfig, overrides: Sequence[str], loader: ConfigLoader) -> list[list[str]] | None:
    """The overrides of each job of a sweep, as Hydra's own sweeper makes them; None of another sweeper."""
    if not config.hydra.sweeper._target_.endswith(".BasicSweeper"):
        return None
    swept = [f"{key}={value}" for key, value in (config.hydra.sweeper.get("params") or {}).items()]
    parsed = OverridesParser.create(config_loader=loader).parse_overrides([*swept, *overrides])
    return BasicSweeper.split_arguments(parsed, max_batch_size=None)[0]


def failure_of(job_return: JobReturn) -> Exception | None:
    """The error that a job ended with, without raising it; None for one that did not fail."""
    return job_return._return_value if job_return.status == JobStatus.FAILED else None


def fail_for_dead_jobs(error: Callable[[str], Exception]) -> None:
    """Let a submitit job that ended without a result have failed with error(why): Hydra's launcher would raise what
    submitit raises, and wait for no other job."""
    from submitit.core.core import Job
    from submitit.core.utils import UncompletedJobError

    results = Job.results

    def results_or_failure(job: Job) -> list[JobReturn]:
        try:
            return results(job)
        except UncompletedJobError as dead:
            what = " ".join(" ".join(str(dead).splitlines()[:2]).split())
            return [JobReturn(status=JobStatus.FAILED, _return_value=error(f"{what}; see {job.paths.stderr}"))]

    Job.results = results_or_failure


def read_when_raised(error: Exception) -> tuple[Path | None, str | None]:
    """(file, name) of the config that Hydra was reading when it raised the error: it names them in its frames only.

    The file, where it could not be read; the name, such as schedule/mine, where its defaults list is wrong.
    """
    for frame, _ in traceback.walk_tb(error.__traceback__):
        module = frame.f_globals.get("__name__", "")
        if module == _READER and "full_path" in frame.f_locals:
            return Path(frame.f_locals["full_path"]), None
        if module == _REPOSITORY and isinstance(error, ValueError) and "defaults" in str(error):
            return None, str(frame.f_locals.get("config_path"))
    return None, None


@contextmanager
def read_once() -> Iterator[None]:
    """In here Hydra reads each YAML file, lists the options of a group and puts the same files together once.

    By itself it does so for every job of a sweep, three times each, and copies all that it knows for each look at a
    group: 60 to 85 ms of a job, of which 10 to 15 are left; --help shows in a hundredth of the time. What is in the
    files counts when they are first read.
    """
    changed = {
        (ConfigLoaderImpl, "get_group_options"): _listing_once(ConfigLoaderImpl.get_group_options),
        (ConfigLoaderImpl, "_compose_config_from_defaults_list"): _composing_once(
            ConfigLoaderImpl._compose_config_from_defaults_list
        ),
        (config_loader_impl, "create_defaults_list"): _choosing_once(config_loader_impl.create_defaults_list),
        (ConfigRepository, "load_config"): _reading_once(ConfigRepository.load_config),
        (CachingConfigRepository, "__init__"): _of_the_same_files,
    }
    private = {(owner, name): getattr(owner, name) for owner, name in changed}
    for (owner, name), ours in changed.items():
        setattr(owner, name, ours)
    try:
        yield
    finally:
        for (owner, name), theirs in private.items():
            setattr(owner, name, theirs)


def _listing_once(private: Callable) -> Callable:
    @cache
    def listed(loader, group_name: str, results_filter: ObjectType | None) -> list[str]:
        return loader.repository.get_group_options(group_name, results_filter)

    def options(self, group_name, results_filter=ObjectType.CONFIG, config_name=None, overrides=None):
        if config_name is not None or overrides:
            return private(self, group_name, results_filter, config_name, overrides)
        return list(listed(self, group_name, results_filter))

    return options


def _reading_once(private: Callable) -> Callable:
    read = {}

    def load_config(self, config_path):
        key = (_folders(self), config_path)
        if key not in read:
            read[key] = private(self, config_path)
        return read[key]

    return load_config


def _choosing_once(private: Callable) -> Callable:
    chosen = {}

    def create_defaults_list(repo, config_name, overrides_list, prepend_hydra, skip_missing):
        given = [each for each in overrides_list if not each.is_sweep_override()]
        settings = [
            each for each in given if isinstance(each.value(), dict) or not repo.group_exists(each.key_or_group)
        ]
        options = tuple(each.input_line for each in given if each not in settings)
        key = (_folders(repo), config_name, options, prepend_hydra, skip_missing)
        if key not in chosen:
            chosen[key] = private(repo, config_name, overrides_list, prepend_hydra, skip_missing)
        return dataclasses.replace(chosen[key], config_overrides=settings)

    return create_defaults_list


def _composing_once(private: Callable) -> Callable:
    composed = {}

    def compose(self, defaults, repo):
        key = (_folders(repo), repr(defaults))
        if key not in composed:
            if len(composed) == COMPOSED:  # the oldest
                del composed[next(iter(composed))]
            composed[key] = pickle.dumps(private(self, defaults=defaults, repo=_Copies(repo)), pickle.HIGHEST_PROTOCOL)
        return pickle.loads(composed[key])  # a copy, for overrides change it; a deep copy takes three times as long

    return compose


class _Copies:
    """A repository whose configs become parts of a composed one."""

    def __init__(self, repository):
        self.repository = repository

    def __getattr__(self, name: str):
        return getattr(self.repository, name)

    def load_config(self, config_path):
        return copy.deepcopy(self.repository.load_config(config_path))


def _folders(repository) -> tuple[tuple[str, str], ...]:
    """By which a repository is told from one with other folders of YAML files."""
    return tuple((source.scheme(), source.path) for source in repository.get_sources())


def _of_the_same_files(self, delegate) -> None:
    """CachingConfigRepository.__init__ without a deep copy of all sources: only the list of them is ever exchanged."""
    self.delegate, self.cache = copy.copy(delegate), {}
