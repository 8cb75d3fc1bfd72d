"""The processes of a run, as torchrun starts them: who writes, what is added up, what one reads for all.

Light to import: the command line asks for `rank` before torch is loaded.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

from luqrun.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

T = TypeVar("T")
# Of a collective. That a process died is noticed at once, on its closed connections.
TIMEOUT = timedelta(minutes=30)


class RefusedByFirst(UserError):
    """What the first process refused, and has told already."""


def rank() -> int:
    """Of this process; 0 where there is only one."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def planned_as(processes: int) -> Iterator[None]:
    """In here this process counts as one of that many, none of which is started."""
    before = os.environ.get("WORLD_SIZE")
    os.environ["WORLD_SIZE"] = str(processes)
    try:
        yield
    finally:
        if before is None:
            del os.environ["WORLD_SIZE"]
        else:
            os.environ["WORLD_SIZE"] = before


def local_rank() -> int:
    """Of this process among those of its machine: the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """How many processes there are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return rank() == 0


def under_torchrun() -> bool:
    """Whether torchrun started this process, perhaps as the only one."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def recorded(work: Callable[..., T]) -> Callable[..., T]:
    """`work`, such that torchrun's last words on a failed job hold the error of the process that failed first.

    Not a UserError: that is told in one line. Nor what a lost peer raises here: torchrun dates errors in whole seconds,
    and would name this process instead of the one that died.
    """
    if not under_torchrun():
        return work
    from torch.distributed.elastic.multiprocessing.errors import record

    @record
    def recording(*arguments):
        try:
            return work(*arguments), None
        except Exception as error:
            if isinstance(error, UserError) or lost_a_peer(error):
                return None, error
            raise

    def telling(*arguments) -> T:
        result, refusal = recording(*arguments)
        if refusal is not None:
            raise refusal
        return result

    return telling


def lost_a_peer(error: Exception) -> bool:
    """Whether a collective failed because another process has ended."""
    told = isinstance(error, RuntimeError) and re.search(
        "(closed|reset) by peer|Broken pipe|remote process", str(error)
    )
    return world_size() > 1 and bool(told)


def join() -> None:
    """Meet the other processes. Nothing to do where there is only one."""
    if world_size() == 1:
        return
    import torch
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    store, *place = next(rendezvous("env://", timeout=TIMEOUT))
    # After a restart torchrun serves the same store, with the addresses of the dead in it (pytorch issue 135712). The
    # number of restarts tells them apart, but each machine counts its own.
    if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
        store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    elif os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and is_first():
        log.warning("for restarts on several machines, set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun")
    # What the host adds up goes over gloo also where the gradients go over NCCL: no GPU is waited for.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=place[0], world_size=place[1], timeout=TIMEOUT)


def leave() -> None:
    """Part from the other processes."""
    if world_size() > 1:
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()


def all_reduce_sum(values: Iterable[float]) -> list[float]:
    """Each value's sum over all processes."""
    return _reduced(values, "SUM")


def all_reduce_max(value: float) -> float:
    """The largest of all processes' values."""
    return _reduced([value], "MAX")[0]


def gather(value: T) -> list[T]:
    """Each process' value, which is sent as a pickle, in the order of the ranks."""
    if world_size() == 1:
        return [value]
    import torch.distributed as dist

    values: list = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def _reduced(values: Iterable[float], op: str) -> list[float]:
    if world_size() == 1:
        return list(values)
    import torch
    import torch.distributed as dist

    total = torch.tensor(list(values), dtype=torch.float64)
    dist.all_reduce(total, op=getattr(dist.ReduceOp, op))
    return total.tolist()


def run_on_first(read: Callable[[], T]) -> T:
    """What `read` returns in the first process, in all of them. Where it raises a UserError or OSError there, the
    others raise RefusedByFirst."""
    if world_size() == 1:
        return read()
    import torch.distributed as dist

    told: list = [None, None]
    refusal = None
    if is_first():
        try:
            told[0] = read()
        except (UserError, OSError) as error:
            refusal, told[1] = error, str(error)
    dist.broadcast_object_list(told, src=0)
    if refusal is not None:
        raise refusal
    if told[1] is not None:
        raise RefusedByFirst(told[1])
    return told[0]


def broadcast(tensors: Iterable[Tensor]) -> None:
    """Overwrite the tensors of all processes with the first one's."""
    if world_size() > 1:
        import torch.distributed as dist

        for tensor in tensors:
            dist.broadcast(tensor, src=0)
