"""The table of post-training: runs of job=evaluate by what trained their weights and by what they were evaluated in."""

import json

import pytest
import yaml
from omegaconf import OmegaConf
from report_runs import run_json
from running import composed

from luqrun import RESULTS
from luqrun.cli.validation import to_config
from luqrun.report.command import main
from luqrun.runs.identity import LAYOUT

TOP1 = {("fp32", "fp32"): 82.0, ("fp32", "luq"): 71.0, ("luq", "fp32"): 79.0, ("luq", "luq"): 80.0}


def write(outputs, row, quant, seed, **keys) -> None:
    """A run folder as job=evaluate leaves it."""
    given = ["+experiment=post_training/embedded", f"cell.row={row}", f"quant={quant}", f"seed={seed}"]
    path = outputs / "embedded" / "post_training" / f"evaluate-{row}-{quant}-{seed}"
    path.mkdir(parents=True)
    config = OmegaConf.to_container(OmegaConf.structured(to_config(composed(*given))))
    (path / "config.yaml").write_text(yaml.safe_dump({**config, **keys}))
    identity = {"results": RESULTS, "layout": LAYOUT, "world_sizes": [1], "data": {"weights": f"{row}{seed}"}}
    (path / "run.json").write_text(json.dumps({**run_json("finished", given), **identity}))
    metrics = {"val/top1": TOP1[row, quant] + seed / 2, "val/top5": 95.0, "val/loss": 0.7}
    row = {"kind": "epoch", "epoch": 0, "step": 0, "phase": "evaluate", **metrics}
    (path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    evaluated = {"weights": "last.pt", "trained_with": "fp32"}
    summary = {**metrics, "evaluated": evaluated, "evaluation_seconds": 1.0, "peak_memory_bytes": 5}
    (path / "summary.json").write_text(json.dumps(summary))


@pytest.fixture
def outputs(tmp_path):
    for row, quant in TOP1:
        for seed in (0, 1, 2):
            write(tmp_path, row, quant, seed)
    return tmp_path


def test_each_cell_has_its_seeds_and_is_compared_with_fp32_throughout(outputs, capsys):
    assert main([str(outputs)]) == 0
    text = (outputs / "tables" / "embedded-post_training.md").read_text()
    assert "Post-training: weights that the first recipe trained, evaluated with the second" in text
    rows = [[part.strip() for part in line.split("|")[1:4]] for line in text.splitlines() if line.startswith("| ")]
    assert rows[2:] == [
        ["fp32, fp32", "82.5 ± 0.5 (3)", "baseline"],
        ["fp32, luq", "71.5 ± 0.5 (3)", "\u221211.0 ± 0.0 (3)"],
        ["luq, fp32", "79.5 ± 0.5 (3)", "\u22123.0 ± 0.0 (3)"],
        ["luq, luq", "80.5 ± 0.5 (3)", "\u22122.0 ± 0.0 (3)"],
    ]
    assert "missing" not in text
    assert "trained in another way" not in capsys.readouterr().out


def test_what_is_missing_has_its_command(outputs):
    for path in (outputs / "embedded" / "post_training" / "evaluate-luq-fp32-2").iterdir():
        path.unlink()
    assert main([str(outputs)]) == 0
    text = (outputs / "tables" / "embedded-post_training.md").read_text()
    assert "luqrun +experiment=post_training/embedded cell.row=luq seed=2 quant=fp32" in text


def test_an_evaluation_of_other_data_is_left_out(outputs, capsys):
    config = to_config(composed("+experiment=post_training/embedded"))
    dataset = OmegaConf.to_container(OmegaConf.structured(config))["dataset"]
    for path in (outputs / "embedded" / "post_training" / "evaluate-luq-fp32-2").iterdir():
        path.unlink()
    (outputs / "embedded" / "post_training" / "evaluate-luq-fp32-2").rmdir()
    write(outputs, "luq", "fp32", 2, dataset={**dataset, "batch_size": 7})
    assert main([str(outputs)]) == 0
    assert "dataset.batch_size=7 instead of 128" in capsys.readouterr().out
