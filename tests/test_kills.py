"""A run that is killed and started again ends as the run that nobody killed. scripts/kill_test.py kills more."""

import random
import sys

import pytest
from kills import kill_variant
from shell import Shell

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks processes up in /proc")
KILLS = 10  # of each variant
VARIANTS = {
    "fp32": ("dataset.augment=true",),
    "bf16": (
        "precision=bf16",
        "quant=luq_hindsight",
        "schedule.accumulate=2",
        "schedule.epochs=2",
        "dataset.workers=1",
    ),
}


@pytest.fixture(scope="module")
def shell(tmp_path_factory):
    shell = Shell(tmp_path_factory.mktemp("cache"))
    yield shell
    shell.close()


@pytest.mark.parametrize("variant", VARIANTS)
def test_killed_and_resumed_is_bit_identical(shell, tmp_path, variant):
    tally = kill_variant(shell, tmp_path, VARIANTS[variant], KILLS, random.Random(variant))
    assert tally.differences == []
    assert tally.survived == tally.kills == KILLS
