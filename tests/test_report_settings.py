"""Runs of one table that were trained in different ways: named, not averaged."""

from dataclasses import replace

import yaml
from report_runs import a_record

from luqrun.report.settings import of_one_kind


def trained(seed, epochs=6, **more):
    config = {"seed": seed, "schedule": {"epochs": epochs, "finetune_lr": 0.1}, "dataset": {"root": None}, **more}
    return replace(a_record("fig2", "luq", "top1", seed, 80.0), config=yaml.safe_dump(config))


def test_what_the_cells_stand_for_may_differ():
    alike = [
        trained(0, quant={"name": "luq"}, study="a"),
        trained(1, quant={"name": "fp32"}, finetune={"epochs": 3}, device="cuda"),
        trained(2, dataset={"root": "elsewhere"}),
    ]
    assert of_one_kind(alike) == (alike, [])
    assert of_one_kind([]) == ([], [])


def test_the_minority_is_left_out_with_what_differs():
    usual, odd = [trained(0), trained(1)], trained(2, epochs=1)
    kept, (left_out,) = of_one_kind([*usual, odd])
    assert kept == usual
    assert left_out.path == odd.path
    assert left_out.reason.endswith("most runs of its table: schedule.epochs=1 instead of 6")


def test_without_a_majority_none_is_kept():
    kept, left_out = of_one_kind([trained(0), trained(1, epochs=1)])
    assert kept == []
    assert len(left_out) == 2


def test_each_model_has_settings_of_its_own():
    runs = [trained(0, model={"name": "a"}), trained(1, model={"name": "b"}, epochs=9)]
    assert of_one_kind(runs) == (runs, [])
