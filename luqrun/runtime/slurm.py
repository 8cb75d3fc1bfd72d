"""Ranks that submitit starts, one task each, on one node or several: they become what torchrun would have made them."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping

from luqrun.runtime import process_group


def planned_ranks(hydra: Mapping) -> int:
    """How many processes a run of this command has, before they have joined, from Hydra's settings: in a sweep as many
    as its launcher starts for a job (submitit's nodes and tasks_per_node), else those of torchrun."""
    if getattr(hydra.get("mode"), "name", "") == "MULTIRUN":
        wanted = [hydra["launcher"].get(name) for name in ("nodes", "tasks_per_node")]
        return math.prod(count for count in wanted if isinstance(count, int))
    return process_group.world_size()


def join_ranks() -> None:
    """In one of several tasks of a submitit job: set RANK, WORLD_SIZE, MASTER_ADDR and so on, as torchrun does.

    What other ranks than the first say is in their own files, under .submitit.
    """
    if "SUBMITIT_EXECUTOR" not in os.environ or "RANK" in os.environ:
        return
    from submitit import JobEnvironment
    from submitit.helpers import TorchDistributedEnvironment

    if JobEnvironment().num_tasks == 1:
        return
    # Every rank sees all devices of its node and takes the one of its LOCAL_RANK, as under torchrun.
    TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
