"""For the tests of the runner: compose a tiny run as the command line would, and train it here."""

import functools
import json
import os
from contextlib import contextmanager
from unittest import mock

import numba
import torch
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore

from luqrun.cli.validation import to_config
from luqrun.config import Config, conf_dir
from luqrun.quant.kernels import backend_for
from luqrun.runs.folder import RunFolder
from luqrun.train import trainer

backend_for("cpu")  # chooses numba's threads, before numba is asked for them
# 8 batches an epoch, and two whole validation batches and a smaller one.
TINY = (
    "device=cpu",
    "dataset.glyphs.train_images=256",
    "dataset.glyphs.val_images=94",
    "dataset.batch_size=32",
    "schedule.epochs=1",
    "finetune=none",
    "tracking.log_every=2",
    "tracking.health_every=3",
)


@functools.cache  # a tenth of a second each
def composed(*overrides):
    """What Hydra hands to the job for `luqrun OVERRIDES`."""
    ConfigStore.instance().store(name="schema", node=Config)
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose("config", list(overrides))


def tiny(*overrides) -> Config:
    return to_config(composed(*TINY, *overrides))


@contextmanager
def quiet_machine(cache=None):
    """One thread, since the machine is shared, and the glyphs cached in the folder `cache` or the suite's."""
    threads = torch.get_num_threads(), numba.get_num_threads()
    torch.set_num_threads(1)
    numba.set_num_threads(1)
    try:
        with mock.patch.dict(os.environ, {"XDG_CACHE_HOME": str(cache)} if cache else {}):
            yield
    finally:
        torch.set_num_threads(threads[0])
        numba.set_num_threads(threads[1])


def train(path, *overrides) -> tuple[dict, RunFolder]:
    """Run `luqrun OVERRIDES` on tiny glyphs in this process, in the folder `path`: (summary, folder)."""
    path.mkdir(parents=True, exist_ok=True)
    folder = RunFolder(path)
    with quiet_machine():
        return trainer.run(tiny(*overrides), folder), folder


def build_trainer(path, *overrides, device="cpu") -> trainer.Trainer:
    """The trainer of such a run, before its first step; to be used in quiet_machine."""
    path.mkdir(parents=True, exist_ok=True)
    return trainer.Trainer(tiny(*overrides), RunFolder(path), torch.device(device))


def metrics(folder: RunFolder, kind=None) -> list[dict]:
    """The lines of metrics.jsonl without what the clock decides."""
    lines = [json.loads(line) for line in (folder.path / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if not key.endswith("images_per_second")}
        for line in lines
        if kind in (None, line["kind"])
    ]


def last(folder: RunFolder) -> dict:
    return torch.load(folder.checkpoints / "last.pt", weights_only=True)


def assert_same_tensors(one: dict, other: dict) -> None:
    """Equal keys and bit-identical tensors, however deep."""
    assert one.keys() == other.keys()
    for key in one:
        if isinstance(one[key], dict):
            assert_same_tensors(one[key], other[key])
        elif isinstance(one[key], torch.Tensor):
            assert torch.equal(one[key], other[key]), key
        else:
            assert one[key] == other[key], key
