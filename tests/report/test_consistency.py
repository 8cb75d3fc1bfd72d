"""Runs of one table that were trained in different ways: named, not averaged."""

from dataclasses import replace
from pathlib import Path

import pytest
from report_runs import a_record

from luqrun.report.consistency import one_a_seed, trained_alike


def trained(seed, epochs=6, row="luq", **more):
    config = {"seed": seed, "schedule": {"epochs": epochs, "finetune_lr": 0.1}, "dataset": {"root": None}, **more}
    return replace(a_record("fig2", row, "top1", seed, 80.0), config=config)


def test_what_the_cells_stand_for_may_differ():
    alike = [
        trained(0, quant={"name": "luq"}, study="a"),
        trained(1, row="fp32", quant={"name": "fp32"}, finetune={"epochs": 3}, device="cuda"),
        trained(2, row="int4", quant={"name": "int4"}, dataset={"root": "elsewhere"}),
    ]
    assert trained_alike(alike) == (alike, [])
    assert trained_alike([]) == ([], [])


SKIP = ["first", "last", "shortcut"]


@pytest.mark.parametrize(
    ("usual", "odd", "words"),
    [
        ({"quant": {"skip": SKIP}}, {"quant": {"skip": []}}, f"quant.skip=[] instead of {SKIP}"),
        (
            {"finetune": {"epochs": 3, "lr_base": 0.1}},
            {"finetune": {"epochs": 3, "lr_base": 9}},
            "finetune.lr_base=9 instead of 0.1",
        ),
        (
            {"row": "resnet8", "model": {"name": "resnet8", "stem": "auto"}},
            {"row": "resnet8", "model": {"name": "resnet8", "stem": "small"}},
            "model.stem=small instead of auto",
        ),
        (
            {"quant": {"weight": {"format": "int4"}}},
            {"quant": {"weight": None}},
            "quant.weight.format=None instead of int4",
        ),
    ],
)
def test_the_runs_of_a_cell_share_recipe_finetune_and_model(usual, odd, words):
    same, other = [trained(0, **usual), trained(1, **usual)], trained(2, **odd)
    # The odd one's settings may be those of another cell.
    elsewhere = replace(other, column="other") if "row" in odd else trained(2, row="fp32", **odd)
    kept, (left_out,) = trained_alike([other, *same, elsewhere])
    assert kept == [*same, elsewhere]
    assert left_out.path == other.path
    assert left_out.reason.startswith("trained in another way than most runs of its cell: ")
    assert left_out.reason.endswith(f": {words}")


def test_two_ways_of_one_cell_are_both_left_out():
    kept, left_out = trained_alike([trained(0, quant={"skip": SKIP}), trained(1, quant={"skip": []})])
    assert kept == []
    assert [each.reason for each in left_out] == [
        "trained in another way than others of its cell, and neither are most: " + words
        for words in (f"quant.skip={SKIP} instead of []", f"quant.skip=[] instead of {SKIP}")
    ]


def test_without_a_finetune_its_settings_are_not_used():
    runs = [trained(seed, finetune={"name": "none", "epochs": 0, "lr_base": rate}) for seed, rate in ((0, 0.1), (1, 9))]
    assert trained_alike(runs) == (runs, [])


def test_the_root_of_a_folder_is_the_data_set():
    def of(root, name="folder"):
        return {"dataset": {"name": name, "root": root}}

    usual = [trained(0, **of("data")), trained(1, **of(str(Path("data").resolve()))), trained(2, **of("x/../data/"))]
    odd = trained(3, **of("other"))
    kept, (left_out,) = trained_alike([*usual, odd])
    assert kept == usual
    other, data = Path("other").resolve(), Path("data").resolve()
    assert left_out.reason.endswith(f"most runs of its table: dataset.root={other} instead of {data}")
    packed = [trained(0, **of("data", "cifar10")), trained(1, **of("other", "cifar10"))]
    assert trained_alike(packed) == (packed, [])


def test_a_link_to_a_data_set_is_that_data_set(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "link").symlink_to("data")
    runs = [
        trained(seed, dataset={"name": "folder", "root": str(tmp_path / name)})
        for seed, name in enumerate(("data", "link"))
    ]
    assert trained_alike(runs) == (runs, [])


def test_the_only_choice_of_one_process_is_no_setting():
    runs = [trained(0), trained(1, distributed={"batch_norm": "local", "range": "rank"})]
    assert trained_alike(runs) == (runs, [])
    odd = trained(2, distributed={"batch_norm": "sync", "range": "rank"})
    assert [each.path for each in trained_alike([*runs, odd])[1]] == [odd.path]


def test_the_minority_is_left_out_with_what_differs():
    usual, odd = [trained(0), trained(1)], trained(2, epochs=1)
    kept, (left_out,) = trained_alike([*usual, odd])
    assert kept == usual
    assert left_out.path == odd.path
    assert left_out.reason.endswith("most runs of its table: schedule.epochs=1 instead of 6")


def test_runs_of_other_numbers_are_not_averaged_with_most():
    old, new = trained(0), [trained(seed) for seed in (1, 2)]
    new = [replace(record, run={**record.run, "results": 2}) for record in new]
    kept, (left_out,) = trained_alike([old, *new])
    assert kept == new
    assert left_out.reason.endswith("RESULTS=1 instead of 2")


def test_without_a_majority_none_is_kept():
    kept, left_out = trained_alike([trained(0), trained(1, epochs=1)])
    assert kept == []
    assert [each.reason.rpartition(": ")[2] for each in left_out] == [
        "schedule.epochs=6 instead of 1",
        "schedule.epochs=1 instead of 6",
    ]


def test_where_rows_are_models_each_has_settings_of_its_own():
    runs = [trained(0, row="a", model={"name": "a"}), trained(0, row="b", model={"name": "b"}, epochs=9)]
    assert trained_alike(runs) == (runs, [])
    odd = trained(1, row="b", model={"name": "b"}, epochs=9, precision="bf16")
    kept, left_out = trained_alike([*runs, trained(2, row="b", model={"name": "b"}, epochs=9), odd])
    assert (len(kept), [each.path for each in left_out]) == (3, [odd.path])


def test_where_rows_are_no_models_all_runs_are_of_one():
    usual = [trained(seed, row="fp32", model={"name": "resnet18"}) for seed in range(3)]
    odd = [trained(seed, row="luq", model={"name": "resnet8"}) for seed in range(2)]
    kept, left_out = trained_alike([*usual, *odd])
    assert kept == usual
    assert [each.path for each in left_out] == [record.path for record in odd]
    assert left_out[0].reason.endswith("most runs of its table: model.name=resnet8 instead of resnet18")


def test_of_many_keys_three_are_named():
    odd = trained(2, epochs=1, precision="bf16", compile=True, dataset={"batch_size": 1}, job="other", zeal=1)
    _, (left_out,) = trained_alike([trained(0), trained(1), odd])
    assert left_out.reason.endswith(
        ": dataset.batch_size=1 instead of None, job=other instead of None, precision=bf16 instead of None, and 2 more"
    )


def test_of_measured_runs_only_the_recipe_counts():
    runs = [trained(seed, epochs=seed, job="rounding", quant={"name": "luq"}) for seed in (0, 1)]
    assert trained_alike(runs) == (runs, [])
    odd = trained(2, job="rounding", quant={"name": "fp32"})
    assert [each.path for each in trained_alike([*runs, odd])[1]] == [odd.path]


def test_a_table_is_of_its_latest_results_alone():
    """Else the cells that were repeated would be compared with cells of other numbers, or be left out for them."""
    old = [trained(seed, row=row) for row in ("luq", "fp32") for seed in (0, 1)]
    old = [
        replace(record, path=Path(f"old{number}"), run={"status": "finished", "results": 1})
        for number, record in enumerate(old)
    ]
    new = replace(trained(0, row="fp32"), path=Path("new"), run={"status": "finished", "results": 2})
    elsewhere = replace(old[0], study="other", path=Path("elsewhere"))
    kept, left_out = one_a_seed([*old, new, elsewhere])
    assert kept == [new, elsewhere]
    assert [each.path for each in left_out] == [record.path for record in old]
    assert {each.reason for each in left_out} == {"of RESULTS 1: its table has runs of RESULTS 2 too"}
