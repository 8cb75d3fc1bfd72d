"""The loaders: which example comes when, on which rank, with which augmentation.

The order of an epoch is a pure function of (seed, epoch), the augmentation of an example one of (seed, epoch, index).
Neither depends on the number of workers or ranks, nor on where the epoch was entered, so that a resumed run sees
what the uninterrupted one would have seen.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import re
import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from ctypes import c_bool
from multiprocessing.sharedctypes import RawValue
from typing import TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from luqrun.config import DatasetConfig
from luqrun.errors import UserError, check_at_least
from luqrun.runtime.seeds import AUGMENT, ORDER, mix
from luqrun.runtime.signals import ASKING
from luqrun.tasks.task import Batch, Data, Examples

T = TypeVar("T")


def train_loader(
    data: Data, config: DatasetConfig, seed: int, epoch: int, first_batch: int = 0, rank: int = 0, world_size: int = 1
) -> DataLoader:
    """One epoch of shuffled training batches, each of batch_size / world_size examples, or as the data say (Batched).

    A batch is of all ranks; rank r takes every world_size-th example of it from the r-th on. Of batches of batch_size
    the last, incomplete one is left out. `first_batch` batches are skipped without being loaded.
    Raises UserError for an impossible batch_size, and, from the iteration, for an unreadable example.
    """
    count = batches_per_epoch(data, config)
    check_ranks(config, world_size)
    rng = np.random.Generator(np.random.Philox(key=int(mix(seed, ORDER, epoch)[0])))
    if is_batched(data):
        batches = data.train.batches(rng)
        assert len(batches) == count
        if (smallest := min(map(len, batches))) < world_size:
            raise UserError(
                f"a batch of {smallest} examples cannot be shared by {world_size} processes: raise "
                f"dataset.batch_tokens={config.batch_tokens}, or lower dataset.max_length={config.max_length}"
            )
    else:
        order, size = rng.permutation(len(data.train)), config.batch_size
        batches = [order[start : start + size] for start in range(0, count * size, size)]
    return _loader(data.train, config, seed, epoch, [batch[rank::world_size] for batch in batches[first_batch:]])


def eval_loader(examples: Examples, config: DatasetConfig, rank: int = 0, world_size: int = 1) -> DataLoader:
    """The examples in order, each exactly once over all ranks; the last batch may be smaller.

    Rank r takes every world_size-th batch of `config.batch_size` examples from the r-th on, whole: what is computed
    from a batch, the range of its activations say, must not depend on the number of ranks. The ranks may differ by one
    in the number of batches: gather results after the loop (`in_order`), not in it.
    """
    check_ranks(config, world_size)
    indices = np.arange(len(examples))
    batches = [indices[start : start + config.batch_size] for start in range(0, len(indices), config.batch_size)]
    return _loader(examples, config, 0, 0, batches[rank::world_size])


def in_order(parts: Sequence[list[T]]) -> list[T]:
    """One result a batch of each rank's eval_loader, parts[rank], in the order of the examples."""
    count = sum(map(len, parts))
    return [parts[number % len(parts)][number // len(parts)] for number in range(count)]


def batches_per_epoch(data: Data, config: DatasetConfig) -> int:
    """Batches in an epoch of training. Raises UserError if there is not even one."""
    check_at_least("dataset.batch_size", config.batch_size, 1)
    if is_batched(data):
        return data.train.num_batches
    if config.batch_size > len(data.train):
        raise UserError(
            f"dataset.batch_size={config.batch_size} is more than the {len(data.train)} training examples "
            "(all, or what dataset.limit leaves)"
        )
    return len(data.train) // config.batch_size


def is_batched(data: Data) -> bool:
    """Whether the data say which training examples share a batch (luqrun.tasks.task.Batched)."""
    return hasattr(data.train, "num_batches")


class _Loader(DataLoader):
    def __iter__(self) -> Iterator[Batch]:
        """The batches. Close it when leaving it early: its workers end then, also one that is blocked in a read."""
        unwanted, others, workers = RawValue(c_bool, False), set(multiprocessing.active_children()), set()
        self.worker_init_fn, served = functools.partial(_ignore_signals, unwanted), 0

        def end() -> None:
            unwanted.value = True
            if served < len(self):
                with suppress(RuntimeError):  # torch's, that a worker was killed, or that we have killed one
                    _end(workers)
                    workers.clear()

        try:
            try:
                batches = super().__iter__()
                workers |= set(multiprocessing.active_children()) - others
                for batch in batches:
                    if isinstance(batch, UserError):
                        raise batch
                    served += 1
                    yield batch
            except (EOFError, ConnectionError) as error:  # a batch that a worker had sent in part when it died
                raise RuntimeError("DataLoader worker (pid unknown) exited unexpectedly") from error
            finally:
                end()
        finally:
            end()  # torch tells once, in whichever line it is, that a worker was killed: in one of the two


class _Served(Dataset):
    """One epoch of a set of examples: turns indices, int64 (n,), into a batch."""

    def __init__(self, examples: Examples, seed: int, epoch: int):
        self.examples = examples
        self.seed = seed
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.examples)

    def __getitems__(self, indices: np.ndarray):
        keys = mix(self.seed, AUGMENT, self.epoch, indices)
        try:
            return self.examples.batch(indices, keys)
        except UserError as error:
            # Raised in a worker it would arrive as another error, its text a traceback.
            return error


def _loader(examples: Examples, config: DatasetConfig, seed: int, epoch: int, schedule: list[np.ndarray]) -> DataLoader:
    check_at_least("dataset.workers", config.workers, 0)
    return _Loader(
        _Served(examples, seed, epoch),
        batch_sampler=schedule,
        num_workers=config.workers,
        prefetch_factor=4 if config.workers else None,
        collate_fn=_as_it_is,
        pin_memory=config.workers > 0 and torch.cuda.is_available(),
        generator=torch.Generator(),  # else starting the loader would draw from torch's own generator
    )


def _as_it_is(batch):
    return batch


def _end(workers: Iterable[multiprocessing.Process]) -> None:
    """End workers at once: torch would wait five seconds for each that is blocked, and then for ever."""
    for worker in workers:
        worker.terminate()
    deadline = time.monotonic() + 2
    for worker in workers:
        worker.join(max(0.0, deadline - time.monotonic()))
    for worker in workers:
        if worker.is_alive():  # in the kernel: on a network disk that is gone
            worker.kill()
            worker.join(1)


def _ignore_signals(unwanted: RawValue, worker: int) -> None:
    """Signals often go to the whole group of processes: the run needs its workers until its step is done. `unwanted` is
    true when it does not any more."""
    for number in ASKING:
        signal.signal(number, signal.SIG_IGN)
    # A handler, unlike what is ignored, is run inside of a read that does not end. Code 0: torch takes no offence.
    signal.signal(signal.SIGTERM, lambda *what: os._exit(0) if unwanted.value else None)


def explain_dead_worker(error: RuntimeError, config: DatasetConfig) -> str:
    """What to do about a loader worker that has died, in one line; "" for any other error."""
    text = str(error)
    fewer = f"lower dataset.workers={config.workers}, and the run goes on from the last checkpoint"
    size = "batch_size" if config.batch_tokens is None else "batch_tokens"
    fewer += f" (with a smaller dataset.{size}={getattr(config, size)} it is another run)"
    if config.workers == 0:
        return ""
    if re.search("DataLoader worker.*Bus error|/torch_", text):  # that is what torch's shared memory is called
        return f"the loader's workers had too little shared memory: enlarge /dev/shm, or {fewer}"
    if "Too many open files" in text or "received 0 items of ancdata" in text:
        return f"the loader's workers had too few open files: raise ulimit -n, or {fewer}"
    if death := re.search(r"DataLoader worker \(pid.*?\) (is killed by signal: [\w ]+|exited unexpectedly)", text):
        how = death[1].strip().replace("is killed", "was killed")
        return f"a loader worker {how}, as happens when memory is short: {fewer}"
    return ""


def check_ranks(config: DatasetConfig, world_size: int) -> None:
    """Raise UserError unless `world_size` processes can share a batch equally."""
    check_at_least("dataset.batch_size", config.batch_size, 1)
    if config.batch_size % world_size:
        raise UserError(f"dataset.batch_size={config.batch_size} must be a multiple of the {world_size} processes")
