"""Ranks that submitit starts: torchrun's variables from those of the cluster."""

import os

import pytest
from hydra.types import RunMode

from luqrun.runtime.slurm import join_ranks, planned_ranks

SECOND_OF_NODE_2 = {
    "SUBMITIT_EXECUTOR": "slurm",
    "SLURM_JOB_ID": "17",
    "SLURM_NTASKS": "4",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_JOB_NODELIST": "gpu[07-08]",
    "SLURM_NODEID": "1",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}
TORCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "CUDA_VISIBLE_DEVICES")


@pytest.fixture
def joined(monkeypatch):
    """joined(**variables): torch's variables after join_ranks in that environment."""
    pytest.importorskip("submitit", reason="the extra slurm is not installed")

    def joined(**variables):
        for name in [*TORCH, *SECOND_OF_NODE_2]:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        try:
            join_ranks()
            return {name: os.environ[name] for name in TORCH if name in os.environ}
        finally:
            for name in TORCH:
                os.environ.pop(name, None)

    return joined


def test_a_rank_of_slurm_is_one_of_torch(joined):
    found = joined(**SECOND_OF_NODE_2)
    assert 20000 <= int(found.pop("MASTER_PORT")) <= 60000
    assert found == {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "gpu07",
    }


def test_all_ranks_agree(joined):
    other = joined(**SECOND_OF_NODE_2)
    first = joined(**{**SECOND_OF_NODE_2, "SLURM_PROCID": "0"})
    assert first["RANK"] == "0"
    assert all(first[name] == other[name] for name in ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE"))


@pytest.mark.parametrize(
    "variables",
    [{}, {**SECOND_OF_NODE_2, "SLURM_NTASKS": "1"}, {**SECOND_OF_NODE_2, "SUBMITIT_EXECUTOR": None}],
    ids=["nothing", "one task", "slurm alone"],
)
def test_a_single_process_stays_one(joined, variables):
    found = joined(**{name: value for name, value in variables.items() if value is not None})
    assert found == {}


def test_what_torchrun_has_set_stays(joined):
    found = joined(**SECOND_OF_NODE_2, RANK="1", WORLD_SIZE="2")
    assert found == {"RANK": "1", "WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    ("mode", "launcher", "ranks"),
    [
        (RunMode.MULTIRUN, {"nodes": 2, "tasks_per_node": 8}, 16),
        (RunMode.MULTIRUN, {"nodes": None, "tasks_per_node": 4}, 4),
        (RunMode.MULTIRUN, {}, 1),  # Hydra's own launcher
        (RunMode.RUN, {"nodes": 2, "tasks_per_node": 8}, 3),  # which then launches nothing: torchrun does
    ],
)
def test_how_many_ranks_a_run_will_have_is_known_before_they_start(monkeypatch, mode, launcher, ranks):
    monkeypatch.setenv("WORLD_SIZE", "3" if mode == RunMode.RUN else "1")
    assert planned_ranks({"mode": mode, "launcher": launcher}) == ranks
