"""For the tests of the report: run folders as a training leaves them, and records of them, without any training."""

import functools
import json
import sys
from pathlib import Path

import yaml
from omegaconf import OmegaConf
from running import composed

from luqrun import __version__
from luqrun.cli.validation import to_config
from luqrun.report.records import Record
from luqrun.report.tables import Table, build_tables
from luqrun.runs.folder import RunFolder

STEPS = 78  # of an epoch
DIVERGED = None  # in place of a top-1
ORDERED = {
    "fp32": [82.0, 82.6, 81.4],
    "biased_log": [70.1, 71.0, 69.5],
    "fp4_sr": [75.0, 75.9, 74.5],
    "fp4_su": [77.0, 77.8, 76.6],
    "uniform_sr": [DIVERGED] * 3,
    "luq": [80.1, 80.5, 79.6],
}


@functools.cache  # OmegaConf takes a twentieth of a second
def _template() -> str:
    """config.yaml as the command line writes it, without what differs."""
    values = OmegaConf.to_container(OmegaConf.structured(to_config(composed("reuse=true"))))
    rest = {name: value for name, value in values.items() if name not in ("seed", "study", "cell")}
    return yaml.safe_dump(rest, sort_keys=False)


def config_text(cell: dict | None, seed: int, study: str) -> str:
    """config.yaml of a run."""
    return _template() + yaml.safe_dump({"seed": seed, "study": study, "cell": cell}, sort_keys=False)


def run_json(status: str, overrides: list[str]) -> dict:
    """run.json of a run in this state."""
    started = {
        "status": status,
        "overrides": overrides,
        "start": "2026-01-02T03:04:05Z",
        "end": None if status == "running" else "2026-01-02T03:05:05Z",
        "reason": "disk full" if status == "failed" else None,
        "versions": {"python": "3.11.7", "luqrun": __version__, "torch": "2.15.0", "numba": "0.68.1"},
        "platform": "Linux",
        "command": ["luqrun", "-m", *overrides],
        "git_commit": "c0ffee",
        "git_dirty": False,
        "device": "cpu",
        "kernel_backend": "numba 0.68.1, 1 thread(s), GEMMs in int8",
        "threads": 1,
        "world_size": 1,
    }
    return {**started, "diverged_at_step": 123} if status == "diverged" else started


def summary_json(top1: float) -> dict:
    """summary.json of a run without a fine-tune."""
    last = {"val/top1": top1, "val/top5": 97.4, "val/loss": 0.876}
    return {
        **last,
        "before_finetune": last,
        "finetune": [],
        "best_metric": top1,
        "train_seconds": 44.4,
        "evaluation_seconds": 5.5,
        "images_per_second": 2125.1,
        "peak_memory_bytes": 1208082432,
    }


def metrics_lines(curve) -> list[str]:
    """metrics.jsonl: a line within each epoch and one after it."""
    rows = []
    for epoch, top1 in enumerate(curve, 1):
        where = {"phase": "train", "epoch": epoch}
        within = {"loss": 3.8, "lr": 0.01, "images_per_second": 2100.0}
        rows.append({"kind": "step", **where, "step": STEPS * (epoch - 1) + 20, **within})
        after = {"train/loss": 3.8, "train/top1": 2.3, "mean_images_per_second": 2300.0}
        after |= {"val/loss": 0.876, "val/top1": top1, "val/top5": 97.4}
        rows.append({"kind": "epoch", **where, "step": STEPS * epoch, **after})
    return [json.dumps(row) for row in rows]


def write_run(
    outputs: Path, table="fig2", row="luq", column="top1", seed=0, top1=80.0, *,
    scale="embedded", study=None, status="finished", curve=None, name=None, more=(), cell=True,
) -> Path:  # fmt: skip
    """A run folder; a top1 of DIVERGED makes it a diverged one. more: overrides beside the usual ones."""
    study = study or f"{scale}/{table}"
    path = outputs / study / (name or f"resnet8-glyphs-{row}-{column}-seed{seed}-0123abcd")
    path.mkdir(parents=True)
    about = {"table": table, "scale": scale, "row": row, "column": column} if cell else None
    (path / "config.yaml").write_text(config_text(about, seed, study))
    status = "diverged" if top1 is DIVERGED else status
    overrides = [f"seed={seed}", f"quant={row}", f"+experiment={table}/{scale}", *more]
    RunFolder(path).write_json("run.json", run_json(status, overrides))
    curve = curve or ([4.0, 30.5] if status == "diverged" else [4.0, 30.5, top1])
    (path / "metrics.jsonl").write_text("".join(line + "\n" for line in metrics_lines(curve)))
    if status == "finished":
        RunFolder(path).write_json("summary.json", summary_json(top1))
    return path


SIGNATURE = "nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:2.6.0"
TEXT = {  # model: its experiment, its metric, and what else is said of it
    "transformer_tiny": ("small_translation", {"name": "val/bleu", "label": "BLEU", "higher_is_better": True}),
    "bert": ("small_question_answering", {"name": "val/f1", "label": "F1 %", "higher_is_better": True}),
}


def write_text_run(outputs: Path, model: str, quant: str, seed: int, value: float | None, *, more=(), **about) -> Path:
    """A run of table 2 at the small scale. value: what it is judged by; of a translation on test data, where on
    validation data it is one more."""
    experiment, metric = TEXT[model]
    path = write_run(outputs, "table2", model, quant, seed, value, scale="small", **about)
    config = yaml.safe_load((path / "config.yaml").read_text())
    config["model"]["name"] = model
    (path / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    run = json.loads((path / "run.json").read_text())
    overrides = [f"model={model}", f"seed={seed}", f"quant={quant}", f"+experiment=table2/{experiment}", *more]
    RunFolder(path).write_json("run.json", {**run, "overrides": overrides, "metric": metric})
    if value is DIVERGED:
        (path / "metrics.jsonl").write_text("")
        return path
    name, tested = metric["name"], model == "transformer_tiny"
    last = value + 1 if tested else value
    (path / "metrics.jsonl").write_text(json.dumps({"kind": "epoch", name: last}) + "\n")
    result = {name: last, "val/loss": 2.5} | ({} if tested else {"val/em": value - 10})
    on_test = {"test/bleu": value, "test/loss": 2.25, "bleu_signature": SIGNATURE} if tested else {}
    RunFolder(path).write_json("summary.json", {**result, **on_test, "train_seconds": 9.5, "tokens_per_second": 800.0})
    return path


def write_study(outputs: Path, table: str, values: dict, **more) -> None:
    """Runs of a table. values: row, or (row, column), to its top-1 for seeds 0, 1, ..."""
    for cell, found in values.items():
        row, column = cell if isinstance(cell, tuple) else (cell, "top1")
        for seed, top1 in enumerate(found):
            write_run(outputs, table, row, column, seed, top1, **more)


def write_two_tables(outputs: Path) -> Path:
    """fig2 with the paper's ordering, a run that is left out and a name that is no HTML; and a run of table2."""
    write_study(outputs, "fig2", ORDERED)
    write_run(outputs, "fig2", "luq", seed=3, top1=float("nan"))
    write_run(outputs, "fig2", "<b>", seed=0, top1=1.0, name="bold")
    write_run(outputs, "table2", "resnet8", "luq", 0, 79.25)
    return outputs


def write_measured(outputs: Path, table="table1") -> None:
    """A run of job=rounding, of one quantizer in one bin."""
    row = {
        "operand": "weight", "quantizer": "int4/sawb/nearest", "bin": [0, 1], "draws": 8, "drawn": "nearest",
        "x": [0.0, 0.5], "z": 0.0,
        "measured": {"bias": [0, 0.5], "variance": [0, 0], "mse": [0, 0.25]},
        "closed_form": {"bias": [0, 0.5], "variance": [0, 0], "mse": [0, 0.25]},
    }  # fmt: skip
    path = write_run(outputs, table, "forward_only", "rounding", scale="measured")
    (path / "summary.json").write_text(json.dumps({"rounding": [row]}))


def a_record(table, row, column, seed, top1, *, scale="embedded", study=None, curve=None, more=()) -> Record:
    """What would be read from such a folder."""
    diverged = top1 is DIVERGED
    overrides = [f"seed={seed}", f"+experiment={table}/{scale}", *more]
    study = study or f"{scale}/{table}"
    return Record(
        path=Path(f"outputs/{study}/{row}-{column}-seed{seed}"),
        study=study,
        table=table,
        scale=scale,
        row=row,
        column=column,
        seed=seed,
        value=top1,
        curve=tuple(curve or (() if diverged else (4.0, 30.5, top1))),
        rounding=(),
        config={"seed": seed},
        run=run_json("diverged" if diverged else "finished", overrides),
        more={},
    )


def a_table(name: str, values: dict, **more) -> Table:
    """A table of records. values: row, or (row, column), to {seed: top-1}, or to the top-1 of seeds 0, 1, ..."""
    records = []
    for cell, found in values.items():
        row, column = cell if isinstance(cell, tuple) else (cell, "top1")
        by_seed = found if isinstance(found, dict) else dict(enumerate(found))
        records += [a_record(name, row, column, seed, top1, **more) for seed, top1 in by_seed.items()]
    (table,) = build_tables(records)
    return table


def hide(monkeypatch, *modules: str) -> None:
    """As if these packages were not installed."""
    for name in [*sys.modules, *modules]:
        if name.partition(".")[0] in modules:
            monkeypatch.setitem(sys.modules, name, None)
