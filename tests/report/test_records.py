"""The report's records: what is read from run folders, and what is left out with a reason."""

import json

import pytest
import yaml
from report_runs import DIVERGED, metrics_lines, run_json, summary_json, write_measured, write_run

from luqrun.errors import UserError
from luqrun.report.summaries import read_inputs
from luqrun.runs.folder import RunFolder


def only_reason(outputs) -> str:
    """Why the single folder is left out."""
    records, left_out = read_inputs([outputs])
    assert records == []
    (each,) = left_out
    return each.reason


def change(path, name, **values):
    """Change fields of a JSON file."""
    content = json.loads((path / name).read_text())
    (path / name).write_text(json.dumps({**content, **values}))


def test_a_finished_run_is_read(tmp_path):
    path = write_run(tmp_path, "table2", "resnet8", "luq", 3, 79.25, more=["schedule.epochs=3"])
    (record,), left_out = read_inputs([tmp_path])
    assert left_out == []
    assert (record.path, record.study) == (path, "embedded/table2")
    assert (record.table, record.scale, record.row, record.column) == ("table2", "embedded", "resnet8", "luq")
    assert (record.seed, record.value, record.curve) == (3, 79.25, (4.0, 30.5, 79.25))
    assert record.more == {"top5": 97.4, "loss": 0.876, "train_seconds": 44.4}
    assert not record.diverged
    assert record.rounding == ()
    assert record.config == yaml.safe_load((path / "config.yaml").read_text())
    assert record.run == run_json("finished", record.overrides)
    assert record.command == "luqrun seed=3 quant=resnet8 +experiment=table2/embedded schedule.epochs=3"


def test_a_command_can_be_pasted_into_a_shell(tmp_path):
    write_run(tmp_path, more=["quant.skip=[first, last]"])
    (record,), _ = read_inputs([tmp_path])
    assert record.command.endswith(" 'quant.skip=[first, last]'")


def test_a_diverged_run_is_a_record_without_a_number_but_with_its_curve_so_far(tmp_path):
    path = write_run(tmp_path, top1=DIVERGED)
    (record,), left_out = read_inputs([tmp_path])
    assert (record.diverged, record.value, record.curve, left_out) == (True, None, (4.0, 30.5), [])
    lines = (path / "metrics.jsonl").read_text().splitlines()
    for damage in ("{", '{"loss": NaN}', '{"kind": "epoch", "val/top1": "x"}'):
        (path / "metrics.jsonl").write_text("\n".join([*lines[:2], damage, *lines[2:]]))
        assert read_inputs([tmp_path])[0][0].curve == (4.0,)
    (path / "metrics.jsonl").unlink()
    assert read_inputs([tmp_path])[0][0].curve == ()


@pytest.mark.parametrize(
    ("status", "reason"),
    [("running", "incomplete: running"), ("failed", "incomplete: failed (disk full)"), (None, "incomplete: no status")],
)
def test_a_run_that_did_not_end_is_left_out(tmp_path, status, reason):
    path = write_run(tmp_path, status=status)
    RunFolder(path).write_json("summary.json", summary_json(80.0))  # of no help
    assert only_reason(tmp_path) == reason


@pytest.mark.parametrize(("results", "number"), [(..., 1), (1, 1), (2, 2)])
def test_a_record_knows_which_numbers_it_is_of(tmp_path, results, number):
    path = write_run(tmp_path)
    if results is not ...:
        change(path, "run.json", results=results)
    (record,), _ = read_inputs([tmp_path])
    assert record.results == number


@pytest.mark.parametrize("results", ["2", None, 2.0, [2], True])
def test_damaged_results_are_left_out(tmp_path, results):
    change(write_run(tmp_path), "run.json", results=results)
    assert only_reason(tmp_path) == f"run.json is damaged (results is {results!r})"


@pytest.mark.parametrize("versions", [{"luqrun": "0.0.9"}, {}, None, "0.1.0"])
@pytest.mark.parametrize("top1", [80.0, DIVERGED])
def test_the_version_of_the_package_decides_nothing(tmp_path, versions, top1):
    change(write_run(tmp_path, top1=top1), "run.json", versions=versions)
    (record,), left_out = read_inputs([tmp_path])
    assert (record.value, left_out) == (top1, [])


def test_a_run_is_judged_by_the_metric_that_it_recorded(tmp_path):
    path = write_run(tmp_path)
    metric = {"name": "val/loss", "label": "loss", "higher_is_better": False}
    change(path, "run.json", metric=metric)
    (path / "metrics.jsonl").write_text("".join(line + "\n" for line in metrics_lines([80.0])))
    (record,), _ = read_inputs([tmp_path])
    assert (record.value, record.curve, record.metric.label) == (0.876, (0.876,), "loss")
    assert record.more == {"top1": 80.0, "top5": 97.4, "train_seconds": 44.4}
    for damaged in ({"name": "val/loss"}, "val/loss", None, {**metric, "higher_is_better": 1}):
        change(path, "run.json", metric=damaged)
        assert only_reason(tmp_path).startswith("run.json is damaged (metric is ")


@pytest.mark.parametrize("name", ["val/top1", "val/top5", "val/loss", "best_metric"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_summary_with_nan_is_left_out(tmp_path, name, value):
    change(write_run(tmp_path), "summary.json", **{name: value})
    assert only_reason(tmp_path) == f"summary.json holds {'NaN' if value != value else 'Infinity'}"


@pytest.mark.parametrize("value", [-0.5, 100.5, 1e300])
def test_a_top1_that_is_no_percentage_is_left_out(tmp_path, value):
    change(write_run(tmp_path), "summary.json", **{"val/top1": value})
    assert only_reason(tmp_path) == f"val/top1 is {value}"


@pytest.mark.parametrize("name", ["val/top5", "val/loss", "train_seconds"])
@pytest.mark.parametrize("value", ["80", [1.0], True, {}])
def test_other_results_that_are_no_numbers_are_left_out(tmp_path, name, value):
    change(write_run(tmp_path), "summary.json", **{name: value})
    assert only_reason(tmp_path) == f"summary.json is damaged ({name} is {value!r})"


@pytest.mark.parametrize("top1", [0.0, 100.0])
def test_the_ends_of_the_percentage_are_results(tmp_path, top1):
    write_run(tmp_path, top1=top1)
    (record,), _ = read_inputs([tmp_path])
    assert record.value == top1


def test_a_summary_without_top1_is_left_out(tmp_path):
    RunFolder(write_run(tmp_path)).write_json("summary.json", {})
    assert only_reason(tmp_path) == "summary.json has no val/top1"


@pytest.mark.parametrize("table", ["table1", "fig1a"])
@pytest.mark.parametrize("top1", [80.0, DIVERGED])
def test_a_training_is_left_out_of_what_is_measured(tmp_path, table, top1):
    write_run(tmp_path, table, "luq", "rounding", top1=top1)
    assert only_reason(tmp_path) == f"{table} holds what job=rounding measures, which this is not"


def test_what_is_measured_is_left_out_of_trainings(tmp_path):
    write_measured(tmp_path, "fig2")
    assert only_reason(tmp_path) == "fig2 holds results of trainings, which this is not"


@pytest.mark.parametrize("number", [0, 3])
def test_metrics_with_nan_are_left_out(tmp_path, number):
    path = write_run(tmp_path)
    lines = metrics_lines([4.0, 30.5, 80.0])
    lines[number] = lines[number].replace("3.8", "NaN")  # a loss of a step, or of an epoch
    (path / "metrics.jsonl").write_text("\n".join(lines))
    assert only_reason(tmp_path) == f"metrics.jsonl holds NaN in line {number + 1}"


def test_metrics_of_a_diverged_run_may_hold_nan(tmp_path):
    path = write_run(tmp_path, top1=DIVERGED)
    (path / "metrics.jsonl").write_text('{"kind": "step", "loss": NaN}\n')
    records, left_out = read_inputs([tmp_path])
    assert (len(records), left_out) == (1, [])


@pytest.mark.parametrize("line", ['{"kind": "epo', "[1, 2]", "7", "", '{"kind": "epoch", "val/top1": null}'])
def test_damaged_metrics_are_left_out(tmp_path, line):
    path = write_run(tmp_path)
    lines = metrics_lines([4.0, 30.5, 80.0])
    (path / "metrics.jsonl").write_text("\n".join([*lines[:2], line, *lines[2:]]))
    assert only_reason(tmp_path) == "metrics.jsonl is damaged in line 3"


@pytest.mark.parametrize("curve", [[4.0, 30.5], [4.0, 30.5, 79.0], []])
def test_metrics_that_end_before_the_run_are_left_out(tmp_path, curve):
    path = write_run(tmp_path, top1=80.0)
    (path / "metrics.jsonl").write_text("".join(line + "\n" for line in metrics_lines(curve)))
    assert (
        only_reason(tmp_path) == "incomplete: the curve of metrics.jsonl does not end in the val/top1 of summary.json"
    )


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("config.yaml", "config.yaml is not there"),
        ("run.json", "run.json is not there"),
        ("metrics.jsonl", "metrics.jsonl is not there"),
        ("summary.json", "incomplete: finished without summary.json"),
    ],
)
def test_a_missing_file_is_named(tmp_path, name, reason):
    (write_run(tmp_path) / name).unlink()
    assert only_reason(tmp_path) == reason


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("run.json", '{"status": "fini', "run.json is damaged (Unterminated string"),
        ("run.json", "", "run.json is damaged (Expecting value"),
        ("run.json", "[]", "run.json is damaged (it holds a list)"),
        ("run.json", b"\xff\xfe", "run.json is damaged (it is no text)"),
        ("summary.json", '{"val/top1": 8', "summary.json is damaged (Expecting"),
        ("summary.json", '"80"', "summary.json is damaged (it holds a str)"),
        ("summary.json", '{"rounding": 1}', "summary.json is damaged (rounding is 1)"),
        ("summary.json", '{"rounding": [{}]}', "summary.json is damaged (rounding)"),
        ("config.yaml", "model: {name", "config.yaml is not YAML"),
        ("config.yaml", "", "config.yaml is not a configuration"),
        ("config.yaml", "- 1\n", "config.yaml is not a configuration"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, content, reason):
    file = write_run(tmp_path) / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert only_reason(tmp_path).startswith(reason)


@pytest.mark.parametrize("key", ["row", "column", "seed"])
def test_an_incomplete_cell_is_left_out(tmp_path, key):
    path = write_run(tmp_path)
    config = yaml.safe_load((path / "config.yaml").read_text())
    (config if key == "seed" else config["cell"])[key] = None
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    assert only_reason(tmp_path) == "its cell or seed is incomplete"


def test_runs_without_a_cell_belong_to_no_table(tmp_path):
    write_run(tmp_path, cell=False)
    path = write_run(tmp_path, cell=False, seed=2)
    config = yaml.safe_load((path / "config.yaml").read_text())
    config["cell"] = dict.fromkeys(("table", "scale", "row", "column"))
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    broken = write_run(tmp_path, cell=False, seed=1)
    (broken / "run.json").write_text("{")  # and nobody asks
    assert read_inputs([tmp_path]) == ([], [])


def test_duplicates_are_all_left_out_and_name_each_other(tmp_path):
    for name in ("one", "two", "three"):
        write_run(tmp_path, name=name)
    other = write_run(tmp_path, seed=1)
    config = yaml.safe_load((tmp_path / "embedded/fig2/two/config.yaml").read_text())
    config["quant"]["skip"], config["schedule"]["epochs"] = [], 3
    (tmp_path / "embedded/fig2/two/config.yaml").write_text(yaml.safe_dump(config))
    records, left_out = read_inputs([tmp_path])
    assert [record.path for record in records] == [other]
    reasons = {each.path.name: each.reason for each in left_out}
    same, skip = "nor do their settings differ", ["first", "last", "shortcut"]
    apart = f"quant.skip={skip} instead of [], schedule.epochs=6 instead of 3"
    advice = "; a study=NAME of its own for one of them tells them apart"
    assert reasons == {
        "one": f"duplicated: the same cell and seed as three ({same}), two ({apart}){advice}",
        "two": "duplicated: the same cell and seed as "
        + ", ".join(f"{each} (quant.skip=[] instead of {skip}, schedule.epochs=3 instead of 6)"
                    for each in ("one", "three")) + advice,
        "three": f"duplicated: the same cell and seed as one ({same}), two ({apart}){advice}",
    }  # fmt: skip


def test_a_copied_run_is_no_other_study(tmp_path):
    for name in ("one", "two"):
        write_run(tmp_path, name=name)
    _, left_out = read_inputs([tmp_path])
    assert left_out[0].reason == "duplicated: the same cell and seed as two (nor do their settings differ)"


@pytest.mark.parametrize(
    "other", [{"study": "again/fig2"}, {"table": "options", "study": "embedded/fig2"}, {"seed": 7}]
)
def test_the_same_cell_of_another_study_table_or_seed_is_no_duplicate(tmp_path, other):
    write_run(tmp_path, name="one")
    write_run(tmp_path, name="two", **other)
    records, left_out = read_inputs([tmp_path])
    assert (len(records), left_out) == (2, [])


def test_a_failed_run_does_not_make_its_repetition_a_duplicate(tmp_path):
    write_run(tmp_path, name="one", status="failed")
    write_run(tmp_path, name="two")
    records, left_out = read_inputs([tmp_path])
    assert [record.path.name for record in records] == ["two"]
    assert [each.path.name for each in left_out] == ["one"]


def test_empty_outputs(tmp_path):
    (tmp_path / "embedded" / "fig2").mkdir(parents=True)
    (tmp_path / "embedded" / "fig2" / "multirun.yaml").write_text("hydra: {}\n")
    assert read_inputs([tmp_path]) == ([], [])


def test_a_study_is_named_by_its_place_from_wherever_one_looks(tmp_path):
    path = write_run(tmp_path, study="mine/fig2")
    for outputs, study in ((tmp_path, "mine/fig2"), (tmp_path / "mine", "fig2"), (tmp_path / "mine" / "fig2", "fig2")):
        (record,), _ = read_inputs([outputs])
        assert record.study == study
    with pytest.raises(UserError, match="is a run; give the folder that holds its study"):
        read_inputs([path])


def test_the_scale_of_glyphs_is_that_of_embedded_data_today(tmp_path):
    path = write_run(tmp_path, "table2", "resnet8", "luq", scale="glyphs")
    (record,), left_out = read_inputs([tmp_path])
    assert left_out == []
    assert (record.scale, record.study) == ("embedded", "glyphs/table2")
    assert record.config["cell"]["scale"] == "embedded"
    # Today's experiment would bring the study embedded/table2.
    assert record.command == "luqrun seed=0 quant=resnet8 +experiment=table2/embedded study=glyphs/table2"
    given = [
        "seed=0",
        "experiment=table2/glyphs",
        "study=mine",
        "+scale=glyphs",
        "schedule=glyphs/vit_tiny",
        "a.scale=glyphs",
    ]
    change(path, "run.json", overrides=given)
    (record,), _ = read_inputs([tmp_path])
    assert record.overrides == [
        "seed=0", "experiment=table2/embedded", "study=mine", "+scale=embedded", "schedule=embedded/vit_tiny",
        "a.scale=glyphs",
    ]  # fmt: skip
