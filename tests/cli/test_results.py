"""The closing table: every number of the summary, and where to look next."""

import re

import pytest
from running import tiny

from luqrun.cli.results import closing_table, jobs_table
from luqrun.cli.sweeps import Job
from luqrun.runs.folder import RunFolder
from luqrun.runs.metric import Metric


def result(top1):
    return {"val/top1": top1, "val/top5": top1 + 10, "val/loss": top1 / 100}


SUMMARY = {
    "before_finetune": result(71.25),
    "finetune": [{"epoch": 2, **result(73.5)}, {"epoch": 3, **result(75.0)}],
    "images_per_second": 1234.4,
    "train_seconds": 61.7,
    "peak_memory_bytes": 5 * 2**20,
}


def test_accuracies_before_and_after_each_fine_tune_epoch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = closing_table(tiny("finetune=fnt2"), SUMMARY, tmp_path / "outputs" / "study" / "run").splitlines()
    rows = [re.split(r"  +", line) for line in lines if re.search(r"\d\.\d\d  ", line)]
    assert rows == [
        ["1 epoch, quant=luq", "71.25", "81.25", "0.713"],
        ["+ 1 fine-tune epoch", "73.50", "83.50", "0.735"],
        ["+ 2 fine-tune epochs", "75.00", "85.00", "0.750"],
    ]
    assert "resnet8 on glyphs, evaluated with INT4 weights and INT4 activations" in lines
    assert "1234 images/s in training, 62 s of it, peak memory 5 MiB" in lines
    assert lines[-2].endswith("outputs/study/run")
    assert lines[-1].endswith("tensorboard --logdir outputs")


@pytest.mark.parametrize(
    ("overrides", "formats"),
    [
        (("quant=fp32",), "full precision"),
        (("quant.fprop=null",), "full precision"),
        (("quant.fprop.weight=null",), "INT4 activations"),
        (("quant.fprop.weight.format=int8",), "INT8 weights and INT4 activations"),
        (("quant=fp32", "quant.fprop.weight.format=int4"), "INT4 weights"),
        (("quant.dgrad=null", "quant.wgrad=null"), "INT4 weights and INT4 activations"),
    ],
)
def test_an_evaluation_is_in_the_formats_of_fprop(tmp_path, overrides, formats):
    lines = closing_table(tiny(*overrides), SUMMARY, tmp_path).splitlines()
    assert f"resnet8 on glyphs, evaluated with {formats}" in lines


def test_columns_line_up_whatever_the_lengths(tmp_path):
    lines = closing_table(tiny("finetune=fnt2"), SUMMARY, tmp_path).splitlines()
    table = [line for line in lines if re.search(r"\d\.\d\d  |top-1 %", line)]
    assert len({len(line) for line in table}) == 1


def test_another_task_is_shown_by_its_own_metric(tmp_path):
    result = {"val/loss": 1.25, "test/bleu": 27.5, "val/bleu": 26.75}
    summary = {"before_finetune": result, "finetune": [], "tokens_per_second": 900.4, "train_seconds": 3.0}
    metric = Metric("val/bleu", "BLEU", True)
    lines = closing_table(tiny(), {**summary, "peak_memory_bytes": 0}, tmp_path, metric=metric).splitlines()
    assert [line.split() for line in lines[2:4]] == [
        ["after", "BLEU", "loss", "test/bleu"],
        ["1", "epoch,", "quant=luq", "26.75", "1.250", "27.50"],
    ]
    assert lines[4].startswith("900 tokens/s in training, 3 s of it")


def test_the_test_data_and_the_signature_of_a_score_have_lines_of_their_own(tmp_path):
    result = {"val/loss": 1.25, "val/bleu": 26.75}
    summary = {
        **result, "test/loss": 1.5, "test/bleu": 27.5, "bleu_signature": "nrefs:1|tok:13a", "before_finetune": result,
        "finetune": [], "tokens_per_second": 900.4, "train_seconds": 3.0, "peak_memory_bytes": 0,
    }  # fmt: skip
    metric = Metric("val/bleu", "BLEU", True)
    lines = closing_table(tiny(), summary, tmp_path, metric=metric).splitlines()
    assert lines[4:6] == ["on test data: BLEU 27.50, loss 1.500", "bleu_signature: nrefs:1|tok:13a"]
    assert lines[6].startswith("900 tokens/s")


def test_exact_match_is_a_percentage(tmp_path):
    summary = {**SUMMARY, "before_finetune": {"val/em": 41.3, "val/f1": 53.0, "val/loss": 2.0}, "finetune": []}
    lines = closing_table(tiny(), summary, tmp_path, metric=Metric("val/f1", "F1 %", True)).splitlines()
    assert [re.split(r"  +", line) for line in lines[2:4]] == [
        ["after", "F1 %", "EM %", "loss"],
        ["1 epoch, quant=luq", "53.00", "41.30", "2.000"],
    ]


def test_jobs_of_several_tasks_name_their_metrics(tmp_path):
    def job(name, metric, summary):
        (tmp_path / name).mkdir()
        RunFolder(tmp_path / name).write_json("run.json", {"status": "finished", **metric})
        RunFolder(tmp_path / name).write_json("summary.json", summary)
        return Job([f"dataset={name}"], tmp_path / name)

    bleu = {"metric": {"name": "val/bleu", "label": "BLEU", "higher_is_better": True}}
    one, two = job("wmt", bleu, {"val/bleu": 26.754}), job("glyphs", {}, {"val/top1": 80.0})
    assert [line.split()[1:3] for line in jobs_table([one], 61.0).splitlines()[1:-1]] == [
        ["BLEU", "job"],
        ["26.75", "dataset=wmt"],
    ]
    lines = jobs_table([one, two], 3900.0).splitlines()
    assert lines[1].split()[1] == "result"
    assert ["26.75 BLEU" in lines[2], "80.00 top-1 %" in lines[3]] == [True, True]
    assert lines[4:] == ["2 jobs in 1 h 5 min"]


def test_full_precision_says_so(tmp_path):
    assert "evaluated with full precision" in closing_table(tiny("quant=fp32"), {**SUMMARY, "finetune": []}, tmp_path)


def test_a_diverged_run_has_no_numbers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = closing_table(tiny(), {"diverged": 17}, tmp_path / "outputs" / "fig2" / "run")
    assert "luq diverged at step 17" in text
    assert "study outputs/fig2" in text
    assert "top-1" not in text


def test_folders_elsewhere_are_shown_whole(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    folder = tmp_path / "there" / "study" / "run"
    assert str(folder) in closing_table(tiny(), SUMMARY, folder)
