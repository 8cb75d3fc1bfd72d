"""Table 1 and Fig. 1a as measured: lines beside the closed forms, one record a recipe, and what may be claimed."""

import itertools
from dataclasses import replace

import pytest
import torch
from report_runs import a_record, a_table, config_text, run_json
from running import composed, quiet_machine

from luqrun.cli.validation import to_config
from luqrun.report import figures, rounding
from luqrun.report.claims import CONTRADICTED, HOLDS, MISSING, NOT_CONTRADICTED, check_claims, how_tested
from luqrun.report.experiments import ROUNDING_TABLES
from luqrun.report.render import markdown_rounding
from luqrun.report.summaries import read_inputs
from luqrun.runs.folder import RunFolder
from luqrun.train import rounding_experiment

POINTS, DRAWS = 41, 64


@pytest.fixture(scope="module")
def plt():
    pytest.importorskip("matplotlib")
    return figures.pyplot()


def labels(axes) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


@pytest.fixture(scope="module")
def studies(tmp_path_factory):
    """What job=rounding leaves behind for two tables, with few draws."""
    outputs = tmp_path_factory.mktemp("outputs")
    recipes = ("forward_only", "forward_sr", "backward_nearest", "backward_only", "biased_log")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounding_experiment, "DRAWS", DRAWS)
        for name, table in itertools.product(recipes, ROUNDING_TABLES):
            path = outputs / "measured" / table / f"rounding-{name}-seed0-01234567"
            path.mkdir(parents=True)
            cell = {"table": table, "scale": "measured", "row": name, "column": "rounding"}
            (path / "config.yaml").write_text(config_text(cell, 0, f"measured/{table}"))
            RunFolder(path).write_json("run.json", run_json("running", [f"quant={name}"]))
            with quiet_machine(outputs):
                rounding_experiment.run(to_config(composed("job=rounding", f"quant={name}")), RunFolder(path))
    return outputs


def measured_tables(studies):
    tables, left_out = rounding.build_rounding_tables(read_inputs([studies])[0])
    assert left_out == []
    return tables


def test_measured_runs_are_read(studies):
    records, left_out = read_inputs([studies])
    assert left_out == []
    tables, left_out = rounding.build_rounding_tables(records)
    assert [(table.name, len(table.records), table.missing) for table in tables] == [("table1", 5, 0), ("fig1a", 5, 0)]
    assert left_out == []
    assert all(record.value is None and not record.diverged for record in records)


def test_measured_runs_with_nan_are_left_out(studies, tmp_path):
    path = tmp_path / "measured" / "table1" / "run"
    path.mkdir(parents=True)
    for name in ("config.yaml", "run.json", "summary.json"):
        text = next(studies.glob(f"measured/table1/*forward_sr*/{name}")).read_text()
        (path / name).write_text(text.replace('"z": ', '"z": NaN, "was": ', 1))
    records, (left_out,) = read_inputs([tmp_path])
    assert (records, left_out.reason) == ([], "summary.json holds NaN")


def test_table_1_sets_the_measured_beside_the_closed_forms(studies):
    table, _ = measured_tables(studies)
    found = {row[:3]: row[3:] for row in table.lines()}
    assert all(len(row) == len(rounding.HEADER) for row in table.lines())
    # Round to nearest over [0, 1] at 0, 1/40, ...: bias at most 1/2, no variance, and a mean of min(x, 1-x)^2.
    grid = [i / 40 for i in range(POINTS)]
    mse = sum(min(x, 1 - x) ** 2 for x in grid) / POINTS
    assert found["RDN", "int4", "[0, 1]"] == ("0.5 (0.5)", "0 (0)", f"{mse:.4g} ({mse:.4g})", "0.00")
    bias, variance, mse, z = found["SR", "int4", "[0, 1]"]
    mean = sum(x * (1 - x) for x in grid) / POINTS
    assert [text.partition(" ")[2] for text in (bias, variance, mse)] == ["(0)", "(0.25)", f"({mean:.4g})"]
    assert float(mse.split()[0]) == pytest.approx(mean, rel=0.2)
    assert 0 < float(z) < 5
    # FP4: below the smallest level stochastic, or pruned with a bias of up to nearly 1.
    assert found["SR", "e3m0", "[0, 1]"][0].endswith("(0)")
    assert found["pruned", "e3m0", "[0, 1]"][0] == "0.975 (0.975)"
    assert found["RDN", "e3m0", "[32, 64]"][0] == "16 (16)"
    assert len(found) == len(table.lines())
    # In the order of the numbers, not of their digits.
    assert [row[2] for row in table.lines() if row[:2] == ("SR", "e3m0")] == ["[0, 1]", "[4, 8]", "[32, 64]"]


def test_fig_1a_is_drawn_from_the_lowest_bin_of_an_integer_format(plt, studies):
    other, table = measured_tables(studies)
    assert [row[:3] for row in table.lines()] == [("RDN", "int4", "[0, 1]"), ("SR", "int4", "[0, 1]")]
    figure = rounding.draw(table)
    (axes,) = figure.axes
    assert labels(axes) == ["RDN, closed form", "RDN, measured", "SR, closed form", "SR, measured"]
    lines = {line.get_label(): line for line in axes.lines}
    x = torch.linspace(0, 1, POINTS, dtype=torch.float64)
    assert torch.tensor(lines["SR, closed form"].get_ydata()).allclose(x * (1 - x), atol=1e-7)
    assert torch.tensor(lines["RDN, measured"].get_ydata()).allclose(torch.minimum(x, 1 - x) ** 2, atol=1e-7)
    assert list(lines["RDN, measured"].get_ydata()) == pytest.approx(list(lines["RDN, closed form"].get_ydata()))
    plt.close(figure)
    assert rounding.draw(other) is None
    only_gradients = tuple(record for record in table.records if record.row == "backward_only")
    assert rounding.draw(replace(table, records=only_gradients)) is None


X = [0.0, 0.25, 0.5, 0.75, 1.0]
NEAREST = {"bias": [0, 0.25, 0.5, 0.25, 0], "variance": [0] * 5, "mse": [0, 0.0625, 0.25, 0.0625, 0]}
SPREAD = [0, 0.1875, 0.25, 0.1875, 0]
STOCHASTIC = {"bias": [0] * 5, "variance": SPREAD, "mse": SPREAD}


def a_row(drawn, operand="weight", form="int4", ends=(0, 1), z=0.0, **more):
    """What rounding_experiment.measure returns, as exact as its closed form. more: what was measured in its place."""
    closed = {"nearest": NEAREST, "stochastic": STOCHASTIC}[drawn]
    return {
        "operand": operand, "quantizer": f"{form}/sawb/{drawn}", "bin": list(ends), "draws": 8, "drawn": drawn,
        "x": X, "z": z, "closed_form": closed, "measured": {**closed, **more},
    }  # fmt: skip


def a_measured_record(recipe, *rows, seed=0, table="table1", study="measured/table1"):
    record = a_record(table, recipe, "rounding", seed, None, scale="measured", study=study)
    return replace(record, rounding=rows, run=run_json("finished", [f"seed={seed}", f"quant={recipe}"]))


ALL = ("forward_only", "forward_sr", "backward_nearest", "backward_only")


def test_of_a_recipe_one_record_is_shown_and_the_others_are_named():
    records = [a_measured_record(recipe, a_row("stochastic", z=seed), seed=seed) for recipe in ALL for seed in (2, 1)]
    (table, _), left_out = rounding.build_rounding_tables(records)
    assert [(record.row, record.seed) for record in table.records] == [(recipe, 1) for recipe in ALL]
    assert table.missing == 0  # any seed will do
    assert [each.path.name for each in left_out] == [f"{recipe}-rounding-seed2" for recipe in ALL]
    assert left_out[0].reason == "measured again: forward_only-rounding-seed1 is shown, of seed 1"
    assert [line[-1] for line in table.lines()] == ["1.00"]


def test_studies_are_kept_apart():
    records = [a_measured_record("forward_sr", a_row("stochastic", z=z), study=study)
               for z, study in ((1.0, "measured/table1"), (2.0, "mine/table1"))]  # fmt: skip
    tables, left_out = rounding.build_rounding_tables(records)
    found = [(table.title.rpartition(" ")[2], [line[-1] for line in table.lines()]) for table in tables]
    assert found == [("(measured/table1)", ["1.00"]), ("(mine/table1)", ["2.00"]), ("(measured/fig1a)", [])]
    assert left_out == []


def test_a_line_is_about_all_that_is_rounded_alike():
    rows = a_row("stochastic", z=1.0), a_row("stochastic", "activation", z=2.0, bias=[0, 0.1, 0, 0, 0])
    again = a_row("stochastic", z=1.0)
    (table, _), _ = rounding.build_rounding_tables([a_measured_record("a", *rows), a_measured_record("b", again)])
    assert table.lines() == [("SR", "int4", "[0, 1]", "0.1 (0)", "0.25 (0.25)", "0.125 (0.125)", "2.00")]
    assert len(table.rows()) == 2  # the third is the first


def test_bins_are_in_the_order_of_their_numbers():
    rows = [a_row("nearest", ends=ends) for ends in ((32, 64), (4, 8), (0, 1))]
    (table, _), _ = rounding.build_rounding_tables([a_measured_record("forward_only", *rows)])
    assert [line[2] for line in table.lines()] == ["[0, 1]", "[4, 8]", "[32, 64]"]


def test_what_is_missing_is_shown_with_its_command():
    record = a_measured_record("forward_only", a_row("nearest"))
    (table, figure), _ = rounding.build_rounding_tables([record])
    assert (table.missing, figure.missing) == (3, 2)
    command = "luqrun +experiment=table1/measured seed=0 quant="
    assert table.commands == tuple(command + recipe for recipe in ALL[1:])
    assert markdown_rounding(figure) == (
        "## Fig. 1a: mean squared error of RDN and SR over [0, 1] (measured/fig1a)\n\n"
        "Missing runs (2):\n```\nluqrun -m +experiment=fig1a/measured\n```\n"
    )
    assert "8 draws a point.\n\nMissing runs (3):\n```\n" in markdown_rounding(table)
    assert rounding.draw(figure) is None
    assert [each.name for each in rounding.build_rounding_tables([record], ["fig1a"])[0]] == ["fig1a"]
    assert rounding.build_rounding_tables([]) == ([], [])


def verdicts(*rows, table="table1"):
    tables, _ = rounding.build_rounding_tables(
        [a_measured_record("all", *rows, table=table, study=f"measured/{table}")]
    )
    (found,) = [each for each in tables if each.name == table]
    return {finding.claim.text: finding for finding in rounding.check_rounding([found])}


def test_the_measured_claims_hold_for_what_is_exact():
    found = verdicts(a_row("nearest"), a_row("stochastic", z=2.0))
    assert [str(each) for each in found.values()] == [
        f"measured/table1: {rounding.CLOSED}: holds (points: 5)",
        f"measured/table1: {rounding.NEVER_BELOW}: holds (below in 0 of 5 comparisons)",
        # At the two ends nothing is drawn: 3 points, and the normal quantile of 1 - 0.05 / 6 is 2.394.
        f"measured/table1: {rounding.UNBIASED}: not contradicted "
        "(largest |z| of the bias 2.00, bound 2.39 for 3 points with 95% in all)",
    ]
    assert all(finding.passes for finding in found.values())


@pytest.mark.parametrize(
    ("part", "values"), [("bias", [0, 0.25, 0.5, 0.24, 0]), ("variance", [0, 0, 1e-6, 0, 0]), ("mse", [1e-6, *[0] * 4])]
)
def test_rounding_to_nearest_that_is_not_its_closed_form(part, values):
    found = verdicts(a_row("nearest", **{part: values}))
    assert found[rounding.CLOSED].verdict == CONTRADICTED
    assert found[rounding.NEVER_BELOW].verdict == found[rounding.UNBIASED].verdict == MISSING


def test_an_mse_of_stochastic_rounding_below_the_nearest_s():
    low = [0, 0.0625 - 1e-6, 0.25 - 1e-9, 0.1875, 0]  # the second by more than what is written rounds away
    found = verdicts(a_row("nearest"), a_row("stochastic", mse=low))
    assert found[rounding.NEVER_BELOW].verdict == CONTRADICTED
    assert found[rounding.NEVER_BELOW].note == "below in 1 of 5 comparisons"
    assert found[rounding.CLOSED].verdict == HOLDS
    apart = verdicts(a_row("nearest", form="e3m0"), a_row("stochastic", mse=low))  # another format's
    assert apart[rounding.NEVER_BELOW].verdict == MISSING


def test_a_reader_is_told_how_the_measured_claims_were_tested():
    rounding_experiment = [*verdicts(a_row("nearest"), a_row("stochastic")).values()]
    text = how_tested(rounding_experiment)
    assert text.startswith("3 claims about measured rounding: ")
    assert "Bonferroni" in text
    assert "seeds" not in text
    trained = check_claims([a_table("fig2", {"luq": [80.0]})])
    assert how_tested([*trained, *rounding_experiment]).startswith("5 claims about trainings, each tested alone, ")
    assert " 3 claims about measured rounding: " in how_tested([*trained, *rounding_experiment])


def test_the_bound_of_the_bias_grows_with_the_points():
    assert verdicts(a_row("stochastic", z=2.5))[rounding.UNBIASED].verdict == CONTRADICTED
    more = a_row("stochastic", z=2.5), a_row("stochastic", ends=(4, 8))  # of 6 points: 2.638
    assert verdicts(*more)[rounding.UNBIASED].verdict == NOT_CONTRADICTED
    assert verdicts(*more, table="fig1a")[rounding.UNBIASED].verdict == CONTRADICTED  # it shows one bin


def test_a_study_that_was_run_holds_what_is_claimed(studies):
    # 64 draws a point are too few for the normal bound at the ends of a bin; the rest is exact, or far from equal.
    found = {each.claim.text: each for each in rounding.check_rounding(measured_tables(studies)[:1])}
    assert found[rounding.CLOSED].verdict == HOLDS
    assert found[rounding.UNBIASED].note.endswith("for 351 points with 95% in all")
