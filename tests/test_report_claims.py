"""The paper's orderings on numbers made to hold, to fail and to be too few."""

import re

import pytest
from report_runs import DIVERGED, a_table

from luqrun.report.claims import CLAIMS, CONTRADICTED, HOLDS, MISSING, NOT_SHOWN, check_claims
from luqrun.report.layout import expected
from luqrun.report.tables import build_tables

NEEDS_SCIPY = "bounds of more than one seed are scipy's"


def finding(table, text, row=None):
    (found,) = [each for each in check_claims([table]) if each.claim.text == text and each.row == row]
    return found


def verdict(values, text, name="fig2", row=None, **more):
    return finding(a_table(name, values, **more), text, row).verdict


def test_every_claim_is_about_cells_that_exist():
    for table in sorted({claim.table for claim in CLAIMS}):
        for scale in ("cifar", "glyphs", "paper"):
            cells = {(wish.row, wish.column) for wish in expected(table, scale)}
            for claim in CLAIMS:
                for row, column in claim.cells if claim.table == table else ():
                    rows = [row] if row else {row for row, _ in cells}
                    assert {(each, column) for each in rows} <= cells, (claim.text, scale)


def test_the_orderings_that_the_tables_must_show():
    ordered = {(claim.table, *claim.cells) for claim in CLAIMS if list(claim.cells.values()) == [1.0, -1.0]}
    assert {
        ("fig2", ("luq", "top1"), ("uniform_sr", "top1")),
        ("fig2", ("luq", "top1"), ("biased_log", "top1")),
        ("fig1b", ("forward_only", "top1"), ("forward_sr", "top1")),
        ("fig1c", ("backward_only", "top1"), ("backward_nearest", "top1")),
        ("table2", (None, "fp32"), (None, "luq_smp2")),
        ("table2", (None, "luq_smp2"), (None, "luq")),
        ("table3", (None, "fp32_none"), (None, "luq_smp2_none")),
    } <= ordered
    margins = {claim.text: claim.margin for claim in CLAIMS if claim.margin}
    assert len(margins) == 3
    assert set(margins.values()) == {-1.0}


def test_no_tables_no_findings():
    assert check_claims([]) == []
    assert check_claims(build_tables([])) == []


LUQ_ABOVE = "LUQ is above uniform SR"


@pytest.mark.parametrize(
    ("luq", "uniform", "wanted"),
    [
        ([80.0, 81.0, 82.0], [75.0, 76.5, 76.5], HOLDS),  # 5, 4.5, 5.5: the bound is 5 - 2.92 * 0.5 / sqrt(3)
        ([80.0, 81.0, 82.0], [79.0, 81.5, 80.5], NOT_SHOWN),  # 1, -0.5, 1.5
        ([79.0, 81.5, 80.5], [80.0, 81.0, 82.0], NOT_SHOWN),
        ([75.0, 76.5, 76.5], [80.0, 81.0, 82.0], CONTRADICTED),
        ([80.0, 80.0], [80.0, 80.0], NOT_SHOWN),  # equal is not above
        ([80.0, 82.0], [79.0, 78.0], NOT_SHOWN),  # 1 and 4: of two seeds the bound is 2.5 - 6.31 * 2.12 / sqrt(2)
    ],
)
def test_an_ordering_holds_is_not_shown_or_is_contradicted(luq, uniform, wanted):
    pytest.importorskip("scipy", reason=NEEDS_SCIPY)
    assert verdict({"luq": luq, "uniform_sr": uniform}, LUQ_ABOVE) == wanted


def test_seeds_are_paired():
    pytest.importorskip("scipy", reason=NEEDS_SCIPY)
    luq = [60.0, 70.0, 80.0]  # far more spread over seeds than the difference, which is always near 1
    table = a_table("fig2", {"luq": luq, "uniform_sr": [59.0, 68.9, 79.1]})
    found = finding(table, LUQ_ABOVE)
    assert found.verdict == HOLDS
    assert (found.spread.mean, found.spread.count) == (pytest.approx(1.0), 3)
    # t with two degrees of freedom: 2.920; the deviation of 1, 1.1, 0.9 is 0.1.
    assert (found.low, found.high) == pytest.approx((1 - 0.16859, 1 + 0.16859), abs=1e-4)
    assert str(found) == (
        "glyphs/fig2: LUQ is above uniform SR: holds (+1.00 points, seeds: 3, 95% bounds +0.83 and +1.17)"
    )
    assert verdict({"luq": luq, "uniform_sr": [79.1, 59.0, 68.9]}, LUQ_ABOVE) == NOT_SHOWN


def test_only_common_seeds_count():
    pytest.importorskip("scipy", reason=NEEDS_SCIPY)
    table = a_table("fig2", {"luq": {0: 80.0, 1: 81.0, 2: 82.0, 3: 0.0}, "uniform_sr": {1: 75.0, 2: 76.1, 4: 99.0}})
    assert finding(table, LUQ_ABOVE).spread.count == 2


@pytest.mark.parametrize(("luq", "uniform"), [(90.0, 10.0), (10.0, 90.0)])
def test_one_seed_shows_nothing(luq, uniform):
    found = finding(a_table("fig2", {"luq": [luq], "uniform_sr": [uniform]}), LUQ_ABOVE)
    assert (found.verdict, found.spread.mean) == (NOT_SHOWN, luq - uniform)
    assert "seeds: 1, 95% bounds -inf and +inf" in str(found)


@pytest.mark.parametrize(
    "values",
    [
        {"fp32": [80.0]},
        {"luq": [80.0, 81.0]},
        {"luq": {0: 80.0, 1: 81.0}, "uniform_sr": {2: 70.0, 3: 71.0}},  # no seed in common
        {"luq": {0: 80.0}, "uniform_sr": {0: DIVERGED, 1: 70.0}},
    ],
)
def test_missing_runs_are_said(values):
    found = finding(a_table("fig2", values), LUQ_ABOVE)
    assert (found.verdict, found.spread) == (MISSING, None)
    assert str(found) == "glyphs/fig2: LUQ is above uniform SR: runs are missing"


@pytest.mark.parametrize(
    ("luq", "uniform", "wanted"),
    [
        ([80.0, 81.0, 82.0], [DIVERGED] * 3, HOLDS),
        ([80.0], [DIVERGED], HOLDS),
        ([DIVERGED] * 3, [80.0, 81.0, 82.0], CONTRADICTED),
        ([80.0, DIVERGED, 82.0], [10.0, 10.0, 10.0], CONTRADICTED),
        ([DIVERGED] * 3, [DIVERGED] * 3, CONTRADICTED),
    ],
)
def test_a_diverged_run_is_worse_than_any_number(luq, uniform, wanted):
    assert verdict({"luq": luq, "uniform_sr": uniform}, LUQ_ABOVE) == wanted


@pytest.mark.parametrize(
    ("uniform", "wanted"),
    [
        ([DIVERGED, 75.0, 76.0, 76.5], HOLDS),  # the others show it alone
        ([DIVERGED, 81.0, 81.5, 82.5], NOT_SHOWN),
        ([DIVERGED, 90.0, 91.0, 92.0], NOT_SHOWN),  # nor is it contradicted
    ],
)
def test_one_diverged_seed_of_several_is_no_proof(uniform, wanted):
    pytest.importorskip("scipy", reason=NEEDS_SCIPY)
    assert verdict({"luq": [80.0, 81.0, 81.5, 82.0], "uniform_sr": uniform}, LUQ_ABOVE) == wanted


NOT_WORSE = "4 samples are not worse than 2"


@pytest.mark.parametrize(
    ("four", "two", "wanted"),
    [
        ([50.0, 51.0, 52.0], [50.5, 50.0, 52.5], HOLDS),  # -0.5, 1, -0.5: within noise
        ([60.0, 61.0, 62.0], [50.0, 51.0, 52.0], HOLDS),
        ([50.0, 51.0, 52.0], [52.0, 53.1, 53.9], CONTRADICTED),
        ([50.0], [49.0], NOT_SHOWN),
        ([50.0], [51.0], NOT_SHOWN),
        ([50.0, DIVERGED], [49.0, 49.0], CONTRADICTED),
        ([50.0, 50.0], [DIVERGED, DIVERGED], HOLDS),
        ([50.0, 51.0, 52.0, 50.0], [52.0, 53.1, 53.9, DIVERGED], NOT_SHOWN),
    ],
)
def test_not_worse_beyond_noise(four, two, wanted):
    if len(four) > 1:
        pytest.importorskip("scipy", reason=NEEDS_SCIPY)
    assert verdict({"fp2_both4": four, "fp2_both2": two}, NOT_WORSE, "fig5") == wanted


@pytest.mark.parametrize(
    ("sixteen", "wanted"),
    [
        ([79.5, 80.5, 81.4], HOLDS),  # 0.5 to 0.6 below
        ([78.5, 80.0, 80.6], NOT_SHOWN),  # 1.5, 1.0 and 1.4 below
        ([70.0, 71.1, 72.0], CONTRADICTED),
    ],
)
def test_a_margin(sixteen, wanted):
    pytest.importorskip("scipy", reason=NEEDS_SCIPY)
    table = a_table("fig5", {"forward_only": [80.0, 81.0, 82.0], "fp2_both16": sixteen})
    found = finding(table, "16 samples come within 1 point of full-precision gradients")
    assert found.verdict == wanted
    difference = sum(sixteen) / 3 - 81
    assert found.spread.mean == pytest.approx(difference + 1)
    assert f"({difference + 1:+.2f} points of the margin -1, seeds: 3" in str(found)


def test_the_claims_of_tables_by_row_are_tested_in_each_row():
    pytest.importorskip("scipy", reason=NEEDS_SCIPY)
    good = {("resnet8", "fp32"): [80.0, 81.0, 82.0], ("resnet8", "luq_smp2"): [78.0, 79.1, 80.1]}
    bad = {("resnext8", "fp32"): [70.0, 71.0, 72.0], ("resnext8", "luq_smp2"): [72.0, 73.1, 74.1]}
    findings = check_claims([a_table("table2", {**good, **bad})])
    found = {each.row: each.verdict for each in findings if each.claim.text == "fp32 is above LUQ + SMP"}
    assert found == {"resnet8": HOLDS, "mobilenet_tiny": MISSING, "resnext8": CONTRADICTED, "vit_tiny": MISSING}
    assert any(re.match(r"glyphs/table2, resnext8: fp32 is above LUQ \+ SMP: contradicted \(-", str(each))
               for each in findings)  # fmt: skip


@pytest.mark.parametrize(
    ("after", "wanted"),
    [
        ([79.6, 80.4, 81.5], HOLDS),  # of the 2 points lost, 1.4 to 1.6 come back
        ([79.0, 80.0, 81.0], NOT_SHOWN),  # just half
        ([78.2, 79.1, 80.0], CONTRADICTED),
    ],
)
def test_half_of_the_loss_is_recovered(after, wanted):
    pytest.importorskip("scipy", reason=NEEDS_SCIPY)
    columns = {"fp32_none": [80.0, 81.0, 82.0], "luq_smp2_none": [78.0, 79.0, 80.0], "luq_smp2_fnt3": after}
    values = {("resnet8", column): found for column, found in columns.items()}
    text = "three epochs of FNT recover at least half of the loss of LUQ + SMP"
    table = a_table("table3", values)
    found = finding(table, text, "resnet8")
    assert found.verdict == wanted
    assert found.spread.mean == pytest.approx(sum(a - b for a, b in zip(after, [79.0, 80.0, 81.0], strict=True)) / 3)


def test_findings_are_by_study():
    tables = [a_table("fig2", {"luq": [DIVERGED], "uniform_sr": [1.0]}, study=study) for study in ("one", "two")]
    found = [(each.study, each.verdict) for each in check_claims(tables) if each.claim.text == LUQ_ABOVE]
    assert found == [("one", CONTRADICTED), ("two", CONTRADICTED)]
