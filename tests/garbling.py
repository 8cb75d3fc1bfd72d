"""For the tests of garbled run folders and summaries: a small study, what may become of its files, and the report."""

import contextlib
import functools
import io
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from fuzzing import at_most
from hypothesis import strategies as st
from report_runs import write_run, write_study

from luqrun.report import experiments, figures, rounding
from luqrun.report.command import main as tables
from luqrun.runs.folder import RunFolder

FILES = ("config.yaml", "run.json", "summary.json", "metrics.jsonl")
NUMBERS = st.one_of(st.integers(), st.floats(), st.sampled_from([10**400, -1, 0, 100, 101, 1e308, 80.5, True]))
ODD = [
    "",
    "nan",
    "80.5",
    "$x^",
    "_",
    "a|b",
    "fp32",
    "luq",
    "../x",
    "<b>",
    "\ud800",
    "\0",
    "a\nb",
    "2" * 300,
    "finished",
]
TEXTS = st.one_of(st.sampled_from(ODD), st.text(max_size=6))
SINGLE = st.one_of(st.none(), NUMBERS, TEXTS)
VALUES = st.recursive(
    SINGLE, lambda each: st.one_of(st.lists(each, max_size=2), st.dictionaries(TEXTS, each, max_size=2)), max_leaves=4
)
GARBAGE = st.one_of(
    st.binary(max_size=60),
    st.sampled_from([
        b"", b"\xff\xfe", b"{}", b"[]", b"null", b"3", b"NaN", b'{"val/top1": 1e999}', b"[" * 100_000, b"9" * 5000,
        b"a: &a [*a]", b"seed: 2026-99-99", b"{[1]: 2}", b"{1: 2, a: 3}", b"a: 2026-01-02", b"!!python/object:os.x {}",
        b"cell: {table: [fig2]}", b"cell: {table: fig2}", b"? {}", b'{"kind": "epoch"}', b'{"status": "finished"}',
    ]),
)  # fmt: skip
NAMES = st.sampled_from(["a b", "$x^$", "_", "é中", "\udcff", "a\nb", "x" * 200, "-m", "%s{}", "run.json", "a|b"])
WHAT = {  # is done to a file, or its folder, with a value of this kind
    "a value": VALUES,
    "several values": st.lists(VALUES, min_size=2, max_size=4),
    "bytes": GARBAGE,
    "cut": st.none(),
    "deleted": st.none(),
    "key deleted": st.none(),
    "a folder": st.none(),
    "a loop": st.none(),
    "a pipe": st.none(),
    "copied": NAMES,
    "renamed": NAMES,
}


def changes(*files: str, without: str = ""):
    """(what, which file, of which run and how, with which value)."""
    return st.sampled_from(["a value"] * 6 + [what for what in WHAT if what != without]).flatmap(
        lambda what: st.tuples(st.just(what), st.sampled_from(files), st.integers(0, 10**6), WHAT[what])
    )


def change(runs: list[Path], what: str, name: str, number: int, value) -> None:
    """Do it to a file of one of the runs."""
    run = runs[number % len(runs)]
    path = run / name
    if what in ("copied", "renamed"):
        if run.exists() and not (run.parent / value).exists():
            with contextlib.suppress(shutil.Error):  # a loop cannot be copied
                (shutil.copytree if what == "copied" else os.rename)(run, run.parent / value)
        return
    if not path.is_file():
        return
    content = path.read_bytes()
    if what in ("a value", "several values", "key deleted"):
        if name not in FILES:
            return
        for each in value if what == "several values" else [value]:
            path.write_text(with_value(path.read_text(errors="replace"), name, number, what == "key deleted", each))
            number = number * 7919 + 1
        return
    path.unlink()
    if what == "bytes":
        path.write_bytes(value if number % 2 else content + value)
    elif what == "cut":
        path.write_bytes(content[: number % (len(content) + 1)])
    elif what == "a folder":
        path.mkdir()
    elif what == "a loop":
        path.symlink_to(path.name)
    elif what == "a pipe":
        os.mkfifo(path)


def with_value(text: str, name: str, number: int, delete: bool, value) -> str:
    """The text of a file with one of its values exchanged, or without it."""
    try:
        documents = (
            [json.loads(line) for line in text.splitlines()] if name == "metrics.jsonl" else [yaml.safe_load(text)]
        )
    except (ValueError, yaml.YAMLError, RecursionError):
        return text
    places = [place for document in documents for place in _places(document)]
    if not places:
        return text
    where, key = places[number % len(places)]
    if delete:
        del where[key]
    else:
        where[key] = value
    return "".join(json.dumps(document) + "\n" for document in documents)  # JSON is YAML


def _places(document) -> list[tuple]:
    """All (container, key) of a document."""
    items = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    return [place for key, each in list(items) for place in [(document, key), *_places(each)]]


def _make_measured(folder: Path) -> None:
    """Make of a run one of job=rounding."""
    drawn = {"x": [0.0, 0.5, 1.0], "draws": 9, "z": 1.5, "operand": "weight", "quantizer": "int4/absmax", "bin": [0, 1]}
    numbers = {name: [0.0, 0.2, 0.0] for name in ("bias", "variance", "mse")}
    row = {**drawn, "drawn": "nearest", "measured": numbers, "closed_form": numbers}
    RunFolder(folder).write_json("summary.json", {"rounding": [row]})


def write_pristine(outputs: Path) -> Path:
    """Three trainings of fig2 and a measurement of fig1a."""
    write_study(outputs, "fig2", {"fp32": [81.0], "luq": [79.0, 80.5]})
    _make_measured(write_run(outputs, "fig1a", "forward_sr", "rounding", scale="measured"))
    return outputs


def report(outputs: Path, *more: str) -> tuple[int, str, str]:
    """luqrun-tables OUTPUTS: (exit code, standard output, standard error)."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), at_most(60):
        try:
            code = tables([str(outputs), *more])
        except SystemExit as end:
            code = end.code
    return code, out.getvalue(), err.getvalue()


@contextlib.contextmanager
def without_figures() -> Iterator[None]:
    """Figures take half a second each; and what a table expects is read once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "draw", lambda table: None)
        patch.setattr(rounding, "draw", lambda records: None)
        for name in ("experiments_of", "expected_of"):
            patch.setattr(experiments, name, functools.cache(getattr(experiments, name)))
            patch.setattr(f"luqrun.report.tables.{name}", getattr(experiments, name))
        yield
