"""Rows of text beside those of images: a metric for each row, on test data where a run has it, and its own commands."""

import csv
import io
import json
from dataclasses import replace

import pytest
from report_runs import DIVERGED, SIGNATURE, a_record, a_table, write_run, write_text_run

from luqrun.report import summaries
from luqrun.report.claims import NOT_SHOWN, check_claims
from luqrun.report.command import main
from luqrun.report.consistency import trained_alike
from luqrun.report.render import cells_csv, commands_of_all, csv_text, header, line, markdown
from luqrun.report.summaries import read_inputs
from luqrun.report.tables import build_tables
from luqrun.runs.metric import Metric

BLEU = Metric("val/bleu", "BLEU", True)
TRANSLATION = ["dataset.root=/multi30k", "schedule.epochs=3", "study=mine/table2"]
ANSWERS = ["dataset.root=/squad", "model.weights=/minilm", "study=mine/table2"]


def table_of(outputs):
    (table,) = build_tables(read_inputs([outputs])[0])
    return table


def write_both(outputs, **about):
    """fp32 and luq of both rows, two seeds each."""
    for seed in (0, 1):
        for quant, bleu, f1 in (("fp32", 30.0, 53.0), ("luq", 29.0, 50.0)):
            write_text_run(outputs, "transformer_tiny", quant, seed, bleu + seed, more=TRANSLATION, **about)
            write_text_run(outputs, "bert", quant, seed, f1 - seed, more=ANSWERS, **about)


def test_a_run_with_test_data_is_compared_by_them(tmp_path):
    write_text_run(tmp_path, "transformer_tiny", "luq", 0, 29.5)
    (record,), left_out = read_inputs([tmp_path])
    assert left_out == []
    assert (record.value, record.curve) == (29.5, (30.5,))
    assert record.metric == Metric("test/bleu", "test BLEU", True)
    assert record.curve_metric == BLEU
    assert record.more == {"bleu": 30.5, "loss": 2.5, "test/loss": 2.25, "train_seconds": 9.5}
    assert record.notes == {"bleu_signature": SIGNATURE}


def test_a_run_without_is_compared_by_its_validation_data(tmp_path):
    write_text_run(tmp_path, "bert", "luq", 0, 50.0)
    (record,), _ = read_inputs([tmp_path])
    assert (record.value, record.metric.label, record.metric == record.curve_metric) == (50.0, "F1 %", True)
    assert record.more["em"] == 40.0
    assert record.notes == {}


def test_the_curve_must_end_in_the_metric_on_validation_data(tmp_path):
    path = write_text_run(tmp_path, "transformer_tiny", "luq", 0, 29.5)
    (path / "metrics.jsonl").write_text('{"kind": "epoch", "val/bleu": 29.5}\n')
    records, (left_out,) = read_inputs([tmp_path])
    assert records == []
    assert left_out.reason.endswith("does not end in the val/bleu of summary.json")


@pytest.mark.parametrize(("f1", "reason"), [(101.0, "test/f1 is 101.0"), ("53", "summary.json is damaged (test/f1 is")])
def test_a_number_on_test_data_that_cannot_be_is_left_out(tmp_path, f1, reason):
    path = write_text_run(tmp_path, "bert", "luq", 0, 50.0)
    summary = json.loads((path / "summary.json").read_text())
    (path / "summary.json").write_text(json.dumps({**summary, "test/f1": f1}))
    _, (left_out,) = read_inputs([tmp_path])
    assert left_out.reason.startswith(reason)


def test_a_summary_says_the_same_as_the_folder(tmp_path):
    write_both(tmp_path / "outputs")
    (tmp_path / "published").mkdir()
    records, _ = read_inputs([tmp_path / "outputs"])
    path = tmp_path / "published" / "small-table2.json"
    path.write_text(summaries.to_json(records))
    again, left_out = read_inputs([path.parent])
    assert left_out == []
    shown = [[(each.value, each.metric, each.more, each.notes, each.command) for each in found]
             for found in (records, again)]  # fmt: skip
    assert sorted(map(repr, shown[0])) == sorted(map(repr, shown[1]))
    entry = json.loads(path.read_text())[-1]
    assert (entry["test/bleu"], entry["bleu"], entry["notes"]) == (30.0, 31.0, {"bleu_signature": SIGNATURE})
    for notes in (3, {"bleu_signature": 3}, {"val/bleu": "x"}):
        path.write_text(json.dumps([{**entry, "notes": notes}]))
        assert "is damaged (notes)" in read_inputs([path.parent])[1][0].reason


def test_each_row_of_a_table_has_its_metric(tmp_path):
    write_both(tmp_path)
    table = table_of(tmp_path)
    assert header(table)[:3] == ("", "metric", "ours")
    luq, answers = table.cells["transformer_tiny", "luq"], table.cells["bert", "luq"]
    assert line(table, luq) == (
        "transformer_tiny, luq", "test BLEU", "29.5 ± 0.7 (2); 1 missing", "−1.0 ± 0.0 (2)",
        "27.17 (Transformer-base, tokenized BLEU)", "−0.33", "",
    )  # fmt: skip
    shown = line(table, answers)
    assert shown[1:4] == ("F1 %", "49.5 ± 0.7 (2); 1 missing", "−3.0 ± 0.0 (2)")
    assert shown[4:6] == ("85.75 (BERT-base, SQuAD F1)", "−1.28")
    assert shown[6].startswith("−2.57 (BERT-base")
    text = markdown(table)
    assert "What is not called test is on validation data." in text
    assert SIGNATURE in text
    assert "tokenized BLEU, which reads higher" in text
    assert "Xi et al. 2023, arXiv 2306.11987" in text
    assert {len(row.split(" | ")) for row in text.splitlines() if row.startswith("| ")} == {7}


def test_a_row_without_runs_has_no_metric(tmp_path):
    write_text_run(tmp_path, "transformer_tiny", "luq", 0, 29.5)
    table = table_of(tmp_path)
    assert table.metric("bert") is None
    assert header(table)[1] == "ours, test BLEU"  # the only one
    assert line(table, table.cells["bert", "luq"])[1] == "missing"
    rows = {(row["row"], row["metric"], row["value"]) for row in csv.DictReader(io.StringIO(csv_text(table)))}
    assert rows == {("transformer_tiny", "test/bleu", "29.5"), ("transformer_tiny", "test/bleu", ""), ("bert", "", "")}


def test_the_csv_of_cells_names_metric_and_others(tmp_path):
    write_both(tmp_path)
    rows = {(row["row"], row["column"]): row for row in csv.DictReader(io.StringIO(cells_csv(table_of(tmp_path))))}
    answers = rows["bert", "luq"]
    assert (answers["metric"], answers["others_difference"]) == ("f1", "-2.57")
    assert answers["others_model"].startswith("Xi et al. 2023, BERT-base")
    assert (rows["transformer_tiny", "luq"]["metric"], rows["bert", "fp32"]["others_model"]) == ("test/bleu", "")


def test_a_run_that_diverged_has_the_metric_of_those_like_it(tmp_path):
    for seed in (0, 1):
        write_text_run(tmp_path, "transformer_tiny", "fp32", seed, 30.0)
    write_text_run(tmp_path, "transformer_tiny", "biased_log", 0, DIVERGED)
    records, left_out = read_inputs([tmp_path])
    kept, others = trained_alike(records)
    assert (len(kept), left_out, others) == (3, [], [])
    (table,) = build_tables(kept)
    assert [metric.name for metric in table.metrics] == ["test/bleu"]
    assert line(table, table.cells["transformer_tiny", "biased_log"])[1] == "diverged (1 of 1); 2 missing"
    only = a_table("fig2", {"luq": [DIVERGED]})
    assert [metric.name for metric in only.metrics] == ["val/top1"]


def test_numbers_on_test_and_validation_data_are_not_averaged(tmp_path):
    for seed in (0, 1):
        write_text_run(tmp_path, "transformer_tiny", "luq", seed, 30.0)
    path = write_text_run(tmp_path, "transformer_tiny", "luq", 2, 29.0)
    summary = json.loads((path / "summary.json").read_text())
    del summary["test/bleu"]
    (path / "summary.json").write_text(json.dumps(summary))
    kept, (left_out,) = trained_alike(read_inputs([tmp_path])[0])
    assert [record.seed for record in kept] == [0, 1]
    assert left_out.path == path
    assert left_out.reason.endswith("most runs of its table: test data=False instead of True")


def judged(row, values, metric):
    about = {"name": metric.name, "label": metric.label, "higher_is_better": metric.higher_is_better}
    found = [a_record("table2", row, column, seed, value) for column, own in values.items()
             for seed, value in enumerate(own)]  # fmt: skip
    return [replace(record, run={**record.run, "metric": about}) for record in found]


def test_a_claim_goes_by_the_metric_of_its_row():
    pytest.importorskip("scipy")
    values = {"fp32": [2.0, 2.1, 2.2], "luq_smp2": [3.0, 3.2, 3.1]}
    rows = [*judged("resnet8", values, Metric("val/top1", "top-1 %", True)),
            *judged("bert_tiny", values, Metric("val/loss", "loss", False))]  # fmt: skip
    found = {each.row: each.verdict for each in check_claims(build_tables(rows))
             if each.claim.text == "fp32 is above LUQ + SMP"}  # fmt: skip
    assert found == {"resnet8": "contradicted", "bert_tiny": "holds"}


def test_rows_of_several_metrics_are_not_compared():
    records = [a_record("fig2", row, "top1", seed, 50.0 + seed) for row in ("luq", "fp32") for seed in (0, 1)]
    records[:2] = [replace(record, tested=True) for record in records[:2]]
    (table,) = build_tables(records)
    assert table.difference(table.cells["luq", "top1"]) is None
    (found,) = [each for each in check_claims([table]) if each.claim.text == "fp32 is above LUQ"]
    assert (found.verdict, found.note) == (NOT_SHOWN, "its runs have several metrics")


def test_the_biased_baseline_is_tested_where_a_table_has_it(tmp_path):
    pytest.importorskip("scipy")
    write_both(tmp_path)
    for seed in (0, 1):
        write_text_run(tmp_path, "bert", "biased_log", seed, 20.0 - seed)
    claim = "LUQ is above biased FP4"
    found = {each.row: each.verdict for each in check_claims([table_of(tmp_path)]) if each.claim.text == claim}
    assert found == {"transformer_tiny": "runs are missing", "bert": "holds"}
    images = check_claims([a_table("table2", {("resnet8", "luq"): [80.0]})])
    assert not [each for each in images if each.claim.text == claim]


def test_what_is_missing_is_given_what_the_runs_of_its_experiment_were_given(tmp_path):
    write_both(tmp_path, study="mine/table2")
    count, commands = table_of(tmp_path).missing()
    assert (count, len(commands)) == (4 * 3 * 2 - 8, 8)
    assert (
        "luqrun +experiment=table2/small_translation model=transformer_tiny seed=2 quant=luq "
        "dataset.root=/multi30k schedule.epochs=3 study=mine/table2"
    ) in commands
    assert (
        "luqrun -m +experiment=table2/small_question_answering model=bert seed=0,1,2 quant=luq_smp2 "
        "dataset.root=/squad model.weights=/minilm study=mine/table2"
    ) in commands


def test_an_experiment_that_nobody_began_is_given_the_study_alone(tmp_path):
    write_text_run(tmp_path, "transformer_tiny", "luq", 0, 29.5, more=TRANSLATION, study="mine/table2")
    wish = table_of(tmp_path).cells["bert", "luq"].missing[0]
    assert wish.command == (
        "luqrun +experiment=table2/small_question_answering model=bert seed=0 quant=luq dataset.root=DIR "
        "model.weights=DIR study=mine/table2"
    )


def test_all_of_the_table_is_a_command_an_experiment(tmp_path):
    write_both(tmp_path, study="mine/table2")
    assert commands_of_all(table_of(tmp_path)) == [
        "luqrun -m +experiment=table2/small_translation dataset.root=/multi30k schedule.epochs=3 study=mine/table2",
        "luqrun -m +experiment=table2/small_question_answering dataset.root=/squad model.weights=/minilm "
        "study=mine/table2",
    ]


def test_a_page_of_both_rows(tmp_path):
    pytest.importorskip("scipy")
    write_both(tmp_path)
    write_run(tmp_path, "table2", "resnet8", "luq", 0, 79.25)
    assert main([str(tmp_path), "--html"]) == 0
    text = (tmp_path / "tables" / "small.html").read_text()
    assert "<td>transformer_tiny, luq</td><td>test BLEU</td><td" in text
    assert "<th>metric</th><th>ours</th>" in text
    assert "arXiv 2306.11987" in text
    assert "arXiv 2306.11987" in (tmp_path / "tables" / "tables.md").read_text()
