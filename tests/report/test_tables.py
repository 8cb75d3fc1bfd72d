"""Tables: means and differences against numbers worked out by hand, what is missing, Markdown and CSV."""

import csv
import io
import math
import shlex
from pathlib import Path

import pytest
from report_runs import DIVERGED, a_record, a_table, hide

from luqrun.errors import UserError
from luqrun.report.experiments import expected
from luqrun.report.records import LeftOut
from luqrun.report.render import csv_text, header, line, markdown, markdown_findings
from luqrun.report.spread import Spread, bounds
from luqrun.report.tables import build_tables

# fp32: mean 82, deviation 2; luq: mean 81, deviation sqrt(7); luq - fp32 by seed: -1, -2, 0.
FP32, LUQ = [80.0, 82.0, 84.0], [79.0, 80.0, 84.0]


def cell(table, row, column="top1"):
    return table.cells[row, column]


def test_spread_by_hand():
    spread = Spread.of(LUQ)
    assert (spread.mean, spread.count) == (81.0, 3)
    assert spread.deviation == pytest.approx(math.sqrt(7), rel=1e-12)  # n - 1 in the denominator
    assert str(spread) == "81.0 ± 2.6 (3)"
    assert Spread.of([70.25]) == Spread(70.25, None, 1)
    assert str(Spread.of([70.25])) == "70.2 (1)"


def test_bounds_are_student_s():
    pytest.importorskip("scipy")
    # The 95 % quantile of t with 4 degrees of freedom is 2.132 in every table of it; the deviation is sqrt(2.5).
    reach = 2.132 * math.sqrt(2.5) / math.sqrt(5)
    low, high = bounds([1.0, 2.0, 3.0, 4.0, 5.0], 0.95)
    assert (low, high) == pytest.approx((3 - reach, 3 + reach), abs=2e-4)
    # With one degree of freedom it is Cauchy's distribution: tan(pi * 0.45) = 6.3138.
    assert bounds([-1.0, 1.0], 0.95) == pytest.approx((-6.3138, 6.3138), abs=1e-4)
    assert bounds([2.0, 2.0, 2.0], 0.95) == (2.0, 2.0)


def test_bounds_of_a_single_value_are_infinite_and_more_need_scipy(monkeypatch):
    hide(monkeypatch, "scipy")
    assert bounds([5.0], 0.95) == (-math.inf, math.inf)
    with pytest.raises(UserError, match=r"scipy: pip install 'luqrun\[plot\]'"):
        bounds([5.0, 6.0], 0.95)


def test_means_and_paired_differences_by_hand():
    table = a_table("fig2", {"fp32": FP32, "luq": LUQ})
    assert cell(table, "fp32").spread == Spread(82.0, 2.0, 3)
    assert cell(table, "fp4_sr").spread is None
    assert cell(table, "fp32").ours().startswith("82.0 ± 2.0 (3)")
    assert cell(table, "luq").ours().startswith("81.0 ± 2.6 (3)")
    assert table.difference(cell(table, "luq")) == Spread(-1.0, 1.0, 3)  # not sqrt(4 + 7): the seeds are the same
    assert table.baseline(cell(table, "luq")) is cell(table, "fp32")


def test_differences_are_of_common_seeds_only():
    table = a_table("fig2", {"fp32": {0: 80.0, 1: 82.0, 2: 84.0}, "luq": {1: 81.0, 2: 82.0, 3: 10.0}})
    assert table.difference(cell(table, "luq")) == Spread(-1.5, pytest.approx(math.sqrt(0.5)), 2)
    assert cell(table, "luq").ours().startswith("57.7 ± 41.3 (3)")
    apart = a_table("fig2", {"fp32": {0: 80.0}, "luq": {1: 81.0}})
    assert apart.difference(cell(apart, "luq")) is None


def test_the_order_of_the_seeds_does_not_matter():
    records = [a_record("fig2", row, "top1", seed, values[seed]) for row, values in (("fp32", FP32), ("luq", LUQ))
               for seed in range(3)]  # fmt: skip
    (one,), (other,) = build_tables(records), build_tables(records[::-1])
    assert [line(one, each) for each in one.cells.values()] == [line(other, each) for each in other.cells.values()]


def test_diverged_runs_are_said_and_never_averaged():
    table = a_table("fig2", {"fp32": FP32, "luq": [79.0, DIVERGED, 84.0], "uniform_sr": [DIVERGED] * 5})
    luq, uniform = cell(table, "luq"), cell(table, "uniform_sr")
    assert (luq.diverged, luq.values) == (1, {0: 79.0, 2: 84.0})
    assert luq.ours() == "diverged (1 of 3); 81.5 ± 3.5 (2); 2 missing"
    assert table.difference(luq) == Spread(-0.5, pytest.approx(math.sqrt(0.5)), 2)
    assert uniform.ours() == "diverged (5 of 5)"
    assert table.difference(uniform) is None
    assert line(table, uniform) == ("uniform_sr", "diverged (5 of 5)", "", "diverges", "")


def test_the_baselines_of_the_tables():
    rows = {("resnet8", "fp32"): [80.0], ("resnet8", "luq"): [79.0], ("resnext8", "fp32"): [70.0]}
    table = a_table("table2", {**rows, ("resnext8", "luq"): [71.5]})
    assert table.difference(cell(table, "resnet8", "luq")).mean == -1.0
    assert table.difference(cell(table, "resnext8", "luq")).mean == 1.5
    columns = {("resnet8", "fp32_none"): [80.0], ("resnet8", "luq_smp2_fnt1"): [79.5]}
    table = a_table("table3", columns)
    assert table.difference(cell(table, "resnet8", "luq_smp2_fnt1")).mean == -0.5
    table = a_table("fig5", {"forward_only": [80.0], "fp2_smp1": [30.0]})
    assert table.difference(cell(table, "fp2_smp1")).mean == -50.0
    table = a_table("options", {"fp32": [80.0], "luq": [79.0], "luq_pow2": [78.5]})  # an option against LUQ without it
    assert table.difference(cell(table, "luq_pow2")).mean == -0.5
    assert [line(table, cell(table, row))[2] for row in ("fp32", "luq")] == ["+1.0 (1)", "baseline"]


def test_only_the_baseline_is_called_baseline():
    table = a_table("table2", {("resnet8", "fp32"): [80.0], ("lenet", "luq"): [60.0]})  # lenet without fp32
    shown = {each: line(table, table.cells[each])[2] for each in (("resnet8", "fp32"), ("lenet", "luq"))}
    assert shown == {("resnet8", "fp32"): "baseline", ("lenet", "luq"): ""}
    empty = a_table("fig2", {"luq": LUQ})
    assert line(empty, cell(empty, "fp32"))[1:3] == ("missing", "")


def test_lines_set_ours_beside_the_paper_s():
    table = a_table("fig2", {"fp32": [*FP32, 82.0, 82.0], "luq": [*LUQ, 81.0, 81.0]})
    assert line(table, cell(table, "fp32")) == ("fp32", "82.0 ± 1.4 (5)", "baseline", "76.5 (ResNet-50)", "")
    # By seed: -1, -2, 0, -1, -1; the paper's 75.42 - 76.5.
    assert line(table, cell(table, "luq")) == (
        "luq", "81.0 ± 1.9 (5)", "−1.0 ± 0.7 (5)", "75.42 (ResNet-50)", "−1.08",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "row", "column", "difference"),
    [
        ("table2", "resnet18", "luq", -0.61),
        ("table2", "resnet18", "luq_smp2", -0.46),
        ("table2", "resnet18", "radix4_tpr", -1.43),
        ("table2", "resnet50", "luq", -1.08),
        ("table2", "resnet50", "luq_smp2", -0.87),
        ("table2", "resnet50", "radix4_tpr", -2.49),
        ("table2", "mobilenet_v2", "luq", -2.35),
        ("table2", "mobilenet_v2", "luq_smp2", -2.2),
        ("table2", "mobilenet_v2", "radix4_tpr", -3.05),
        ("table2", "resnext50_32x4d", "luq", -1.58),
        ("table2", "resnext50_32x4d", "luq_smp2", -1.48),
        ("table2", "resnext50_32x4d", "radix4_tpr", None),
        ("table2", "vit_b_16", "luq", -2.5),
        ("table2", "vit_b_16", "luq_smp2", -2.1),
        ("table2", "vit_b_16", "fp32", None),
        ("table3", "resnet18", "luq_smp2_none", -0.46),
        ("table3", "resnet18", "luq_smp2_fnt1", 0.0),
        ("table3", "resnet18", "luq_smp2_fnt2", None),
        ("table3", "resnet50", "luq_smp2_none", -0.87),
        ("table3", "resnet50", "luq_smp2_fnt1", -0.61),
        ("table3", "resnet50", "luq_smp2_fnt2", -0.5),
        ("table3", "resnet50", "luq_smp2_fnt3", -0.32),
        ("table3", "mobilenet_v2", "luq_smp2_none", -2.2),
        ("table3", "mobilenet_v2", "luq_smp2_fnt1", -1.8),
        ("table3", "mobilenet_v2", "luq_smp2_fnt2", -1.6),
        ("table3", "mobilenet_v2", "luq_smp2_fnt3", -1.6),
        ("table3", "resnext50_32x4d", "luq_smp2_none", -1.48),
        ("table3", "resnext50_32x4d", "luq_smp2_fnt1", -1.35),
        ("table3", "resnext50_32x4d", "luq_smp2_fnt2", -1.27),
        ("table3", "resnext50_32x4d", "luq_smp2_fnt3", -0.9),
        ("table3", "resnext50_32x4d", "fp32_fnt3", None),
    ],
)
def test_the_paper_s_differences(name, row, column, difference):
    baseline = {"table2": "fp32", "table3": "fp32_none"}[name]
    table = a_table(name, {(row, baseline): [50.0], (row, column): [50.0]})
    found = table.paper_difference(cell(table, row, column))
    assert found == (None if difference is None else pytest.approx(difference, abs=1e-9))


def test_words_of_the_paper_have_no_difference():
    table = a_table("fig2", {"fp32": FP32, "biased_log": LUQ})
    assert line(table, cell(table, "biased_log"))[3:] == ("diverges", "")


def test_missing_runs_have_the_command_that_fills_them():
    table = a_table("fig2", {"fp32": {0: 80.0, 1: 81.0, 2: 82.0, 3: 83.0}})
    fp32, luq = cell(table, "fp32"), cell(table, "luq")
    assert [wish.command for wish in fp32.missing] == ["luqrun +experiment=fig2/embedded seed=4 quant=fp32"]
    assert [wish.seed for wish in luq.missing] == [0, 1, 2, 3, 4]
    assert fp32.ours().endswith("; 1 missing")
    assert luq.ours() == "missing"
    wanted = {wish.command for wish in expected("fig2", "embedded")}
    missing = {wish.command for each in table.cells.values() for wish in each.missing}
    assert wanted - missing == {f"luqrun +experiment=fig2/embedded seed={seed} quant=fp32" for seed in range(4)}
    shown = markdown(table)
    assert "Missing runs (26):\n```\n" in shown
    assert cell(table, "fp32").commands() == ["luqrun +experiment=fig2/embedded seed=4 quant=fp32"]
    assert cell(table, "luq").commands() == ["luqrun -m +experiment=fig2/embedded seed=0,1,2,3,4 quant=luq"]
    listed = shown.partition("```\n")[2].partition("\n```")[0].splitlines()
    assert listed == [command for each in table.cells.values() for command in each.commands()]
    assert len(listed) == 6


def test_seeds_of_one_command_are_listed_as_one_sweep():
    given = ["quant.skip=[first]", "seed_of={0}", "note='a seed=1'"]
    table = a_table("fig2", {"fp32": {1: 80.0, 3: 81.0}}, more=given)
    shown = cell(table, "fp32").commands()
    assert [shlex.split(command) for command in shown] == [
        ["luqrun", "-m", "+experiment=fig2/embedded", "seed=0,2,4", "quant=fp32", *given]
    ]


def test_another_network_than_the_experiment_s_replaces_its_own():
    runs = {("resnet8", "fp32_none"): {0: 80.0}}
    table = a_table("table3", runs, scale="cifar", more=["model=resnet8", "finetune=none"])
    assert table.rows == ["resnet8"]
    assert len(table.cells) == 8
    assert [wish.seed for wish in cell(table, "resnet8", "fp32_none").missing] == [1, 2, 3, 4]
    table = a_table("table3", {("resnet18", "fp32_none"): {0: 80.0}}, scale="cifar", more=["model=resnet18"])
    assert table.rows == ["resnet18", "resnet50"]  # begun, not replaced


def test_a_whole_table_misses_nothing():
    rows = ("fp32", "biased_log", "fp4_sr", "fp4_su", "uniform_sr", "luq")
    table = a_table("fig2", {row: [80.0] * 5 for row in rows})
    assert list(table.cells) == [(row, "top1") for row in rows]
    assert "issing" not in markdown(table)


def test_missing_runs_are_given_what_the_others_were_given():
    given = ["study=mine/fig2", "schedule.epochs=5", "model=resnet8", "dataset.root=/data", "quant.skip=[first]"]
    table = a_table("fig2", {"fp32": {0: 80.0}, "luq": {0: 79.0}}, scale="cifar", study="mine/fig2", more=given)
    (wish,) = [wish for wish in cell(table, "luq").missing if wish.seed == 1]
    assert shlex.split(wish.command) == [
        "luqrun", "+experiment=fig2/cifar", "seed=1", "quant=luq",
        "study=mine/fig2", "schedule.epochs=5", "model=resnet8", "dataset.root=/data", "quant.skip=[first]",
    ]  # fmt: skip
    assert "'quant.skip=[first]'" in wish.command
    own = ["--config-dir", "own"]
    runs = [a_record("fig2", "fp32", "top1", seed, 80.0) for seed in (0, 1)]
    for run in runs:
        run.run.update(command=["luqrun", *own, "-m"], overrides=["+experiment=ours", f"seed={run.seed}"])
    (table,) = build_tables(runs)
    assert cell(table, "luq").missing[0].command == "luqrun --config-dir own +experiment=ours seed=0 quant=luq"
    records = [a_record("fig2", "fp32", "top1", seed, 80.0, more=more) for seed, more in ((0, ["device=cpu"]), (1, []))]
    (table,) = build_tables(records)  # only one of them was given it
    assert cell(table, "luq").missing[0].command == "luqrun +experiment=fig2/embedded seed=0 quant=luq"
    records = [
        a_record("fig2", "fp32", "top1", seed, 80.0, scale="cifar", more=[f"dataset.root=/data{seed}"])
        for seed in (0, 1)
    ]
    (table,) = build_tables(records)  # two roots: which is meant is not known
    shown = cell(table, "luq").missing[0].command
    assert shown == "luqrun +experiment=fig2/cifar seed=0 quant=luq dataset.root=DIR"


def test_cells_beyond_the_experiment_stay():
    table = a_table("fig2", {"fp32": FP32, "int4_nearest": [70.0]})
    assert list(table.cells)[-1] == ("int4_nearest", "top1")
    assert line(table, cell(table, "int4_nearest")) == ("int4_nearest", "70.0 (1)", "−10.0 (1)", "", "")


def test_other_last_phases_stand_in_table_3_beside_fnt():
    columns = {("resnet8", "fp32_none"): [80.0], ("resnet8", "luq_smp2_fnt1"): [79.5]}
    table = a_table(
        "table3", {**columns, ("resnet8", "luq_smp2_qaf3"): [79.0], ("resnet8", "luq_smp2_forward_high1"): [81.0]}
    )
    assert [column for _, column in table.cells][-2:] == ["luq_smp2_forward_high1", "luq_smp2_qaf3"]
    shown = "resnet8, luq_smp2_forward_high1", "81.0 (1)", "+1.0 (1)", "", ""
    assert line(table, cell(table, "resnet8", "luq_smp2_forward_high1")) == shown


def test_tables_are_kept_apart_by_study_and_scale():
    records = [
        a_record("fig2", "luq", "top1", 0, 70.0),
        a_record("fig2", "luq", "top1", 0, 71.0, study="again/fig2"),
        a_record("fig2", "luq", "top1", 0, 72.0, scale="cifar"),
        a_record("options", "luq", "top1", 0, 73.0),
        a_record("table1", "luq", "rounding", 0, None),
    ]
    tables = build_tables(records)
    assert [(table.study, table.name, table.scale) for table in tables] == [
        ("again/fig2", "fig2", "embedded"),
        ("cifar/fig2", "fig2", "cifar"),
        ("embedded/fig2", "fig2", "embedded"),
        ("embedded/options", "options", "embedded"),
    ]
    assert [cell(table, "luq").values[0] for table in tables] == [71.0, 72.0, 70.0, 73.0]
    assert [table.study for table in build_tables(records, ["options"])] == ["embedded/options"]
    assert build_tables([], ["fig2"]) == []


def test_a_run_of_an_unknown_scale_is_shown_with_nothing_missing():
    table = a_table("fig2", {"luq": [70.0]}, scale=None, study="mine")
    assert cell(table, "luq").ours() == "70.0 (1)"
    assert line(table, cell(table, "luq"))[2] == ""


def test_markdown_is_a_table():
    table = a_table("table2", {("resnet8", "fp32"): [80.0] * 3, ("a|b", "luq"): [79.0]})
    lines = markdown(table).splitlines()
    assert lines[0] == "## Table 2: LUQ and LUQ + SMP (embedded/table2)"
    assert lines[2] == "| " + " | ".join(header(table)) + " |"
    assert lines[3] == "| --- | --- | --- | --- | --- | --- |"
    assert lines[4] == "| resnet8, fp32 | 80.0 ± 0.0 (3) | baseline | 69.7 (ResNet-18) |  |  |"
    assert "| a\\|b, luq | 79.0 (1) |  |  |  |  |" in lines
    rows = [each for each in lines[2:] if each.startswith("|")]
    assert len(rows) == 2 + len(table.cells)
    assert {each.replace("\\|", "").count("|") for each in rows} == {len(header(table)) + 1}


def test_csv_parses_back():
    table = a_table("table2", {("resnet8", "fp32"): [80.12345, 81.0], ("resnet8", "luq"): [79.0, DIVERGED]})
    rows = list(csv.DictReader(io.StringIO(csv_text(table))))
    assert len(rows) == len(expected("table2", "embedded"))
    own = [row for row in rows if row["row"] == "resnet8" and row["column"] in ("fp32", "luq")]
    found = [(row["column"], row["seed"], row["status"], row["value"]) for row in own]
    assert found == [
        ("fp32", "0", "finished", "80.1235"),
        ("fp32", "1", "finished", "81.0"),
        ("fp32", "2", "missing", ""),
        ("luq", "0", "finished", "79.0"),
        ("luq", "1", "diverged", ""),
        ("luq", "2", "missing", ""),
    ]
    assert {(row["study"], row["table"]) for row in rows} == {("embedded/table2", "table2")}
    assert {(row["column"], row["paper"], row["paper_model"]) for row in own} == {
        ("fp32", "69.7", "ResNet-18"),
        ("luq", "69.09", "ResNet-18"),
    }
    commands = {(row["row"], row["column"], row["seed"]): row["command"] for row in rows}
    wanted = "luqrun +experiment=table2/embedded model=vit_tiny seed=2 quant=luq_smp2"
    assert commands["vit_tiny", "luq_smp2", "2"] == wanted
    assert commands["resnet8", "luq", "0"] == "luqrun seed=0 +experiment=table2/embedded"


def test_csv_keeps_commas_and_quotes():
    odd = 'quant.skip=["first","last"]'
    table = a_table("fig2", {"luq": [79.0]}, more=[odd])
    first = next(row for row in csv.DictReader(io.StringIO(csv_text(table))) if row["status"] == "finished")
    assert shlex.split(first["command"])[-1] == odd


def test_left_out_folders_are_listed():
    text = markdown_findings([], [LeftOut(Path("outputs/a/b"), "incomplete: running")])
    assert text.splitlines()[-1] == "- outputs/a/b: incomplete: running"
    assert markdown_findings([], []) == ""
