"""The paper's orderings on numbers made to hold, to fail and to be too few."""

import importlib.util
import re

import pytest
from report_runs import DIVERGED, a_table

from luqrun.report.claims import (
    CLAIMS,
    CONTRADICTED,
    HOLDS,
    MISSING,
    NOT_CONTRADICTED,
    NOT_SHOWN,
    check_claims,
    how_tested,  # fmt: skip
)
from luqrun.report.experiments import expected
from luqrun.report.tables import build_tables

NEEDS_SCIPY = "bounds of more than one seed are scipy's"


def finding(table, text, row=None):
    (found,) = [each for each in check_claims([table]) if each.claim.text == text and each.row == row]
    return found


def verdict(values, text, name="fig2", row=None, **more):
    return finding(a_table(name, values, **more), text, row).verdict


EMBEDDED_ALONE = {"mxfp4_rht", "mxfp4_rht_sr", "quartet", "quartet_sr"}  # of the table of formats


def test_every_claim_is_about_cells_that_exist():
    for table in sorted({claim.table for claim in CLAIMS}):
        for scale in ("cifar", "cifar100", "embedded", "paper"):
            cells = {(wish.row, wish.column) for wish in expected(table, scale)}
            for claim in CLAIMS:
                for row, column in claim.cells if claim.table == table else ():
                    if (None, column) == (row, "biased_log"):  # of table 2 at the small scale
                        continue
                    if scale == "cifar" and claim.table == "formats" and column in EMBEDDED_ALONE:
                        continue
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
        "embedded/fig2: LUQ is above uniform SR: holds (+1.00 points; bounds +0.83 and +1.17, each with 95%; seeds: 3)"
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
    assert "; bounds -inf and +inf, each with 95%; seeds: 1)" in str(found)


@pytest.mark.parametrize(
    "values",
    [
        {"fp32": [80.0]},
        {"luq": [80.0, 81.0]},
        {"luq": {0: 80.0, 1: 81.0}, "uniform_sr": {2: 70.0, 3: DIVERGED}},  # no seed in common
    ],
)
def test_missing_runs_are_said(values):
    found = finding(a_table("fig2", values), LUQ_ABOVE)
    assert (found.verdict, found.spread) == (MISSING, None)
    assert not found.passes
    why = " (no seed in common)" if len(values) > 1 else ""
    assert str(found) == f"embedded/fig2: LUQ is above uniform SR: runs are missing{why}"


FIVE = [80.0, 81.0, 82.0, 80.5, 81.5]


@pytest.mark.parametrize(
    ("luq", "uniform", "wanted"),
    [
        (FIVE, [DIVERGED] * 5, HOLDS),  # by chance in one of 32
        (FIVE[:4], [DIVERGED] * 4, NOT_SHOWN),  # in one of 16
        ([80.0], [DIVERGED], NOT_SHOWN),
        (FIVE[:1], [DIVERGED] * 5, NOT_SHOWN),  # one pair
        ([*FIVE, 80.0], [DIVERGED] * 6, HOLDS),
        ([DIVERGED] * 5, FIVE, CONTRADICTED),
        ([DIVERGED] * 4, FIVE, NOT_SHOWN),
        ([DIVERGED] * 5, [DIVERGED] * 5, NOT_SHOWN),  # ties
        ([*FIVE[:4], DIVERGED], [DIVERGED] * 5, NOT_SHOWN),
        ([*FIVE[:4], DIVERGED], [DIVERGED, *FIVE[:4]], NOT_SHOWN),
        ({0: 80.0}, {0: DIVERGED, 1: 70.0}, NOT_SHOWN),
    ],
)
def test_a_claim_by_divergence_needs_five_seeds_on_one_side(luq, uniform, wanted):
    assert verdict({"luq": luq, "uniform_sr": uniform}, LUQ_ABOVE) == wanted


def test_the_seeds_that_diverged_are_counted():
    found = finding(a_table("fig2", {"luq": FIVE[:3], "uniform_sr": [DIVERGED] * 3}), LUQ_ABOVE)
    assert str(found) == (
        "embedded/fig2: LUQ is above uniform SR: not shown (diverged: luq in 0 of 3 seeds, uniform_sr in 3 of 3)"
    )
    values = {("resnet8", "fp32"): FIVE[:3], ("resnet8", "luq_smp2"): [70.0, 71.0, DIVERGED]}
    if importlib.util.find_spec("scipy"):
        found = finding(a_table("table2", values), "fp32 is above LUQ + SMP", "resnet8")
        assert "(diverged: fp32 in 0 of 3 seeds, luq_smp2 in 1 of 3; +10.00 points; bounds " in str(found)
        assert str(found).endswith("seeds: 2)")


def test_a_sum_of_several_cells_with_a_diverged_one_shows_nothing():
    text = "three epochs of FNT recover at least half of the loss of LUQ + SMP"
    for column in ("luq_smp2_none", "luq_smp2_fnt3", "fp32_none"):
        columns = {"fp32_none": FIVE, "luq_smp2_none": [70.0] * 5, "luq_smp2_fnt3": FIVE}
        for own in ([DIVERGED] * 5, [*columns[column][:4], DIVERGED]):
            values = {("resnet8", name): found for name, found in {**columns, column: own}.items()}
            assert verdict(values, text, "table3", "resnet8") == NOT_SHOWN


@pytest.mark.parametrize(
    ("diverged", "finite", "wanted"),
    [
        ("uniform_sr", [75.0, 76.0, 76.5], HOLDS),  # the others show it alone
        ("uniform_sr", [81.0, 81.5, 82.5], NOT_SHOWN),
        ("uniform_sr", [90.0, 91.0, 92.0], NOT_SHOWN),  # nor is it contradicted
        ("luq", [90.0, 91.0, 92.0], NOT_SHOWN),
        ("luq", [81.0, 81.5, 82.5], NOT_SHOWN),
        ("luq", [75.0, 76.0, 76.5], CONTRADICTED),
    ],
)
def test_one_diverged_seed_of_several_is_no_proof(diverged, finite, wanted):
    pytest.importorskip("scipy", reason=NEEDS_SCIPY)
    other = {"luq": "uniform_sr", "uniform_sr": "luq"}[diverged]
    assert verdict({other: [80.0, 81.0, 81.5, 82.0], diverged: [DIVERGED, *finite]}, LUQ_ABOVE) == wanted


NOT_WORSE = "4 samples averaged for both GEMMs are not worse than 2"


@pytest.mark.parametrize(
    ("four", "two", "wanted"),
    [
        ([50.0, 51.0, 52.0], [50.5, 50.0, 52.5], NOT_CONTRADICTED),  # -0.5, 1, -0.5: within noise
        ([60.0, 61.0, 62.0], [50.0, 51.1, 52.0], HOLDS),  # even better
        ([50.0, 51.0, 52.0], [52.0, 53.1, 53.9], CONTRADICTED),
        ([50.0], [49.0], NOT_SHOWN),
        ([50.0], [51.0], NOT_SHOWN),
        ([50.0, DIVERGED], [49.0, 49.0], NOT_SHOWN),
        ([50.0, 51.0, 52.0, DIVERGED], [50.5, 50.0, 52.5, 50.0], NOT_SHOWN),
        ([50.0, 50.0], [DIVERGED, DIVERGED], NOT_SHOWN),
        ([50.0, 51.0, 52.0, 50.0], [50.5, 50.0, 52.5, DIVERGED], NOT_CONTRADICTED),
        ([50.0, 51.0, 52.0, 50.0], [52.0, 53.1, 53.9, DIVERGED], NOT_SHOWN),
    ],
)
def test_not_worse_beyond_noise(four, two, wanted):
    if len(four) > 1:
        pytest.importorskip("scipy", reason=NEEDS_SCIPY)
    found = finding(a_table("fig5", {"fp2_both4": four, "fp2_both2": two}), NOT_WORSE)
    assert found.verdict == wanted
    assert found.passes == (wanted in (HOLDS, NOT_CONTRADICTED))
    assert f"than 2: {wanted} (" in str(found)


def test_samples_of_the_weight_gradient_alone_are_tested_too():
    pytest.importorskip("scipy", reason=NEEDS_SCIPY)
    values = {"fp2_smp8": [50.0, 51.0, 52.0], "fp2_smp16": [47.0, 48.1, 49.2]}
    text = "16 samples averaged for the weight gradient are not worse than 8"
    assert verdict(values, text, "fig5") == CONTRADICTED
    assert len([claim for claim in CLAIMS if claim.table == "fig5" and not claim.strict]) == 8


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
    found = finding(table, "16 samples averaged for both GEMMs come within 1 point of full-precision gradients")
    assert found.verdict == wanted
    difference = sum(sixteen) / 3 - 81
    assert found.spread.mean == pytest.approx(difference)
    shown = f"({difference:+.2f} points, at least -1 claimed; bounds of the difference {found.low:+.2f} and "
    assert shown in str(found)


def test_the_claims_of_tables_by_row_are_tested_in_each_row():
    pytest.importorskip("scipy", reason=NEEDS_SCIPY)
    good = {("resnet8", "fp32"): [80.0, 81.0, 82.0], ("resnet8", "luq_smp2"): [78.0, 79.1, 80.1]}
    bad = {("resnext8", "fp32"): [70.0, 71.0, 72.0], ("resnext8", "luq_smp2"): [72.0, 73.1, 74.1]}
    findings = check_claims([a_table("table2", {**good, **bad})])
    found = {each.row: each.verdict for each in findings if each.claim.text == "fp32 is above LUQ + SMP"}
    assert found == {"resnet8": HOLDS, "resnext8": CONTRADICTED}  # of rows that nobody has begun nothing is said
    assert any(re.match(r"embedded/table2, resnext8: fp32 is above LUQ \+ SMP: contradicted \(-", str(each))
               for each in findings)  # fmt: skip


@pytest.mark.parametrize(
    ("after", "wanted"),
    [
        ([79.6, 80.4, 81.5], HOLDS),  # of the 2 points lost, 1.4 to 1.6 come back
        ([79.0, 80.0, 81.0], NOT_SHOWN),  # just half
        ([78.2, 79.1, 80.0], CONTRADICTED),
    ],
)
@pytest.mark.parametrize(
    ("text", "column"),
    [
        ("one epoch of FNT recovers at least half of the loss of LUQ + SMP", "luq_smp2_fnt1"),
        ("two epochs of FNT recover at least half of the loss of LUQ + SMP", "luq_smp2_fnt2"),
        ("three epochs of FNT recover at least half of the loss of LUQ + SMP", "luq_smp2_fnt3"),
    ],
)
def test_half_of_the_loss_is_recovered(after, wanted, text, column):
    pytest.importorskip("scipy", reason=NEEDS_SCIPY)
    columns = {"fp32_none": [80.0, 81.0, 82.0], "luq_smp2_none": [78.0, 79.0, 80.0], column: after}
    values = {("resnet8", column): found for column, found in columns.items()}
    found = finding(a_table("table3", values), text, "resnet8")
    assert found.verdict == wanted
    assert found.spread.mean == pytest.approx(sum(a - b for a, b in zip(after, [79.0, 80.0, 81.0], strict=True)) / 3)


@pytest.mark.parametrize(
    ("gaps", "wanted"),
    [
        ([0.4, 0.6, 0.5], HOLDS),  # of the 2 points lost
        ([0.9, 1.0, 1.1], NOT_SHOWN),  # just half
        ([1.8, 1.9, 2.0], CONTRADICTED),  # what came back, fp32 gained too
    ],
)
@pytest.mark.parametrize(("count", "epochs"), [(1, "one epoch"), (2, "two epochs"), (3, "three epochs")])
def test_the_loss_is_halved_against_fp32_after_the_same_epochs(gaps, wanted, count, epochs):
    pytest.importorskip("scipy", reason=NEEDS_SCIPY)
    columns = {
        "fp32_none": [80.0, 81.0, 82.0],
        "luq_smp2_none": [78.0, 79.0, 80.0],
        f"fp32_fnt{count}": [84.0, 85.0, 86.0],
        f"luq_smp2_fnt{count}": [longer - gap for longer, gap in zip((84.0, 85.0, 86.0), gaps, strict=True)],
    }
    text = f"after {epochs} of FNT, LUQ + SMP lacks at most half as much of fp32 after as many (our control)"
    values = {("resnet8", column): found for column, found in columns.items()}
    found = finding(a_table("table3", values), text, "resnet8")
    assert found.verdict == wanted
    assert found.spread.mean == pytest.approx(1 - sum(gaps) / 3)
    assert verdict({key: values[key] for key in list(values)[:3]}, text, "table3", "resnet8") == MISSING


def test_a_reader_is_told_how_many_claims_were_tested_and_how():
    findings = check_claims([a_table("fig2", {"luq": [80.0], "uniform_sr": [DIVERGED]})])
    text = how_tested(findings)
    assert text.startswith("5 claims about trainings, each tested alone, without a correction for their number: ")
    assert "95% confidence" in text
    assert "rounding" not in text
    assert "\n" not in text


def test_findings_are_by_study():
    values = {"luq": [DIVERGED] * 5, "uniform_sr": [1.0] * 5}
    tables = [a_table("fig2", values, study=study) for study in ("one", "two")]
    found = [(each.study, each.verdict) for each in check_claims(tables) if each.claim.text == LUQ_ABOVE]
    assert found == [("one", CONTRADICTED), ("two", CONTRADICTED)]
