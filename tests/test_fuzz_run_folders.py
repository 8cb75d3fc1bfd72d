"""Run folders as bad disks and busy hands leave them: the report names what it leaves out; no one sees a traceback."""

import contextlib
import functools
import io
import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import yaml
from fuzzing import at_most, examples
from hypothesis import event, given
from hypothesis import strategies as st
from overriding import command
from report_runs import summary_json, write_run, write_study
from running import TINY, quiet_machine

from luqrun.closing import jobs_table
from luqrun.report import figures, layout, measured
from luqrun.report.command import main as tables
from luqrun.report.pictures import main as pictures
from luqrun.report.records import printable
from luqrun.run_folder import RunFolder
from luqrun.sweeps import Job

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
            path.write_text(_with(path.read_text(errors="replace"), name, number, what == "key deleted", each))
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


def _with(text: str, name: str, number: int, delete: bool, value) -> str:
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


def make_measured(folder: Path) -> None:
    """Make of a run one of task=rounding."""
    drawn = {"x": [0.0, 0.5, 1.0], "draws": 9, "z": 1.5, "operand": "weight", "quantizer": "int4/absmax", "bin": [0, 1]}
    numbers = {name: [0.0, 0.2, 0.0] for name in ("bias", "variance", "mse")}
    row = {**drawn, "drawn": "nearest", "measured": numbers, "closed_form": numbers}
    RunFolder(folder).write_json("summary.json", {"rounding": [row]})


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    outputs = tmp_path_factory.mktemp("pristine")
    write_study(outputs, "fig2", {"fp32": [81.0], "luq": [79.0, 80.5]})
    make_measured(write_run(outputs, "fig1a", "forward_sr", "rounding", scale="measured"))
    return outputs


def report(outputs: Path, *more: str) -> tuple[int, str, str]:
    """scripts/tables.py OUTPUTS: (exit code, standard output, standard error)."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), at_most(60):
        try:
            code = tables([str(outputs), *more])
        except SystemExit as end:
            code = end.code
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def undrawn():
    """Without figures, which take half a second each, and with what a table expects read once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "draw", lambda table: None)
        patch.setattr(measured, "draw", lambda records: None)
        patch.setattr(layout, "expected", functools.cache(layout.expected))
        patch.setattr("luqrun.report.tables.expected", layout.expected)
        yield


def check_report(pristine, done, *more) -> None:
    with tempfile.TemporaryDirectory() as folder:
        outputs = shutil.copytree(pristine, Path(folder) / "outputs")
        runs = sorted(path.parent for path in outputs.rglob("run.json"))
        for each in done:
            change(runs, *each)
        here = {path.parent for name in FILES[:2] for path in outputs.rglob(name)}
        code, out, err = report(outputs, *more)
        event("reported" if code == 0 else "an error in one line")
        if code:
            assert code == 1
            assert len(err.splitlines()) == 1
            assert err.startswith("tables.py: ")
            return
        # Each run is in a table, left out by name, or (its cell is gone) not of the report's business.
        counted = {row["run"] for path in (outputs / "tables").glob("*.json") for row in json.loads(path.read_text())}
        assert report(outputs / "tables")[0] == 0  # what was written is read again
        left_out = [line for line in out.splitlines() if line.startswith("- ") and ": " in line]
        for path in here:
            named = any(printable(path.name) in line for line in left_out)
            assert path.name in counted or named or _without_cell(path) or "fig1a" in str(path), path


@examples(40)
@given(done=st.lists(changes(*FILES), min_size=1, max_size=3))
def test_the_report_names_what_it_leaves_out(pristine, undrawn, done):
    check_report(pristine, done)


@pytest.fixture(scope="module")
def published(pristine, undrawn, tmp_path_factory):
    """The summaries of the same runs, in a folder."""
    out = tmp_path_factory.mktemp("published")
    assert tables([str(pristine), "--out", str(out)]) == 0
    return out


@examples(40)
@given(
    done=st.lists(st.tuples(st.integers(0, 10**6), st.booleans(), VALUES), min_size=1, max_size=3),
    garbage=st.one_of(st.none(), GARBAGE),
)
def test_the_report_names_the_summaries_that_it_leaves_out(published, undrawn, done, garbage):
    with tempfile.TemporaryDirectory() as folder:
        outputs = shutil.copytree(published, Path(folder) / "outputs")
        path = outputs / "glyphs-fig2.json"
        for number, delete, value in done:
            path.write_text(_with(path.read_text(), path.name, number, delete, value))
        try:
            entries = json.loads(path.read_text())
        except ValueError:  # a number that Python does not read
            entries = [None]
        if garbage is not None:
            (outputs / "more.json").write_bytes(garbage)
        code, out, err = report(outputs)
        assert (code, err) == (0, "")
        counted = [row for path in (outputs / "tables").glob("*.json") for row in json.loads(path.read_text())]
        named = [line for line in out.partition("## Runs left out")[2].splitlines() if line.startswith("- ")]
        assert not isinstance(entries, list) or len(counted) + len(named) >= len(entries) + 1  # of Fig. 1a


@examples(3)
@given(done=st.lists(changes(*FILES), min_size=1, max_size=3))
def test_with_figures_and_pages(pristine, done):
    pytest.importorskip("matplotlib")
    check_report(pristine, done, "--html")


@pytest.mark.parametrize("name", ["$x^", "_", "a|b", "é中", "<b>"])
def test_odd_names_in_figures(tmp_path, name):
    pytest.importorskip("matplotlib")
    write_study(tmp_path, "fig2", {name: [80.0, 81.0], "luq": [79.0]}, study=f"of {name}")
    code, _, err = report(tmp_path, "--html")
    assert (code, err) == (0, "")


def _without_cell(path: Path) -> bool:
    try:
        cell = yaml.safe_load((path / "config.yaml").read_text())["cell"]
    except Exception:
        return False
    return cell is None or (isinstance(cell, dict) and not cell.get("table", "missing"))


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder in which `luqrun TINY` has run, and looks finished."""
    folder = tmp_path_factory.mktemp("work")
    with quiet_machine(folder / "cache"):
        assert command(folder, folder / "cache", *TINY).code == 143
    (run,) = (path.parent for path in folder.rglob("run.json"))
    RunFolder(run).update_run(status="finished")
    RunFolder(run).write_json("summary.json", summary_json(80.0))
    return folder


TOUCHED = (*FILES, "checkpoints/last.pt", "run.log", ".lock")
COMMANDS = [(), (), ("study=b", "reuse=true"), ("finetune=fnt1", "resume=base"), ("dataset.root=/x",)]


@examples(12)
@given(done=st.lists(changes(*TOUCHED, without="a pipe"), min_size=1, max_size=3), more=st.sampled_from(COMMANDS))
def test_the_command_in_a_garbled_folder(work, done, more):
    with tempfile.TemporaryDirectory() as temporary, quiet_machine(work / "cache"):
        folder = shutil.copytree(work, Path(temporary) / "work")
        (run,) = (path.parent for path in folder.rglob("run.json"))
        for each in done:
            change([run], *each)
        answer = command(folder, work / "cache", *TINY, *more)
        event({0: "shown", 1: "refused", 143: "trained a step"}.get(answer.code, "neither"))
        assert isinstance(answer.code, int), answer.code
        assert "Traceback" not in answer.err
        assert answer.code in (0, 1, 143)
        assert answer.code != 1 or answer.lines[-1].startswith("luqrun: ")
        assert jobs_table([Job("seed=0", path) for path in folder.glob("outputs/*/*")] or [Job("seed=0", run)])


@pytest.mark.parametrize("name", ["run.json", "summary.json"])
@pytest.mark.parametrize("content", ["[1]", "3", "{", "[" * 100_000, '{"val/top1": "x", "before_finetune": 3}'])
def test_a_file_that_luqrun_did_not_write_is_named(work, tmp_path, name, content):
    folder = shutil.copytree(work, tmp_path / "work")
    (run,) = (path.parent for path in folder.rglob("run.json"))
    (run / name).write_text(content)
    answer = command(folder, work / "cache", *TINY)
    if name == "run.json" and content.startswith('{"'):  # it lacks everything, and nothing is needed
        assert answer.code == 0
    else:
        assert answer.code == 1
        assert answer.lines[-1].startswith("luqrun: ")
        assert f"{name} is damaged" in answer.lines[-1]
        assert "delete it" in answer.lines[-1]


@pytest.mark.parametrize("name", ["checkpoints", "run.log", ".lock", "metrics.jsonl", "config.yaml"])
def test_something_else_in_the_place_of_a_file(work, tmp_path, name):
    folder = shutil.copytree(work, tmp_path / "work")
    (run,) = (path.parent for path in folder.rglob("run.json"))
    (run / "summary.json").unlink()
    shutil.rmtree(run / "checkpoints")
    (run / name).unlink(missing_ok=True)
    (run / name).write_text("x") if name == "checkpoints" else (run / name).mkdir()
    answer = command(folder, work / "cache", *TINY)
    assert answer.code == 1, answer
    assert answer.lines[-1].startswith("luqrun: ")
    assert name in answer.lines[-1]
    assert "Traceback" not in answer.err


EVENTS = [b"", b"\0" * 50, b"\xff" * 200, b"\x18\0\0\0\0\0\0\0garbage" * 9]


@pytest.mark.parametrize("events", EVENTS)
def test_pictures_of_garbled_curves(work, tmp_path, capsys, events):
    pytest.importorskip("matplotlib")
    folder = shutil.copytree(work, tmp_path / "work")
    (run,) = (path.parent for path in folder.rglob("run.json"))
    for path in run.glob("events.*"):
        path.write_bytes(events if not events.startswith(b"\xff") else path.read_bytes()[:-9] + events)
    with pytest.raises(SystemExit) as ended:
        pictures([str(run), "--layer", "none"])
    err = capsys.readouterr().err
    assert (ended.value.code, len([line for line in err.splitlines() if "pictures.py: " in line])) == (1, 1)


@examples(25)
@given(done=st.lists(changes("config.yaml", "checkpoints/last.pt", without="a pipe"), min_size=1, max_size=2))
def test_pictures_of_a_garbled_run(work, done):
    pytest.importorskip("matplotlib")
    with (
        tempfile.TemporaryDirectory() as temporary,
        quiet_machine(work / "cache"),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr("luqrun.report.pictures.draw_health", lambda run: None)
        patch.setattr("luqrun.report.pictures.draw_gradients", lambda gradient: None)
        patch.setattr("luqrun.report.pictures.save", lambda figure, out, name: [])
        folder = shutil.copytree(work, Path(temporary) / "work")
        (run,) = (path.parent for path in folder.rglob("run.json"))
        for each in done:
            change([run], *each)
        run = run if run.exists() else next(run.parent.iterdir())
        err = io.StringIO()
        with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()), at_most(60):
            try:
                code = pictures([str(run), "--out", str(folder / "out")])
            except SystemExit as end:
                code = end.code
        event("drawn" if code == 0 else "refused")
        assert code == 0 or (code == 1 and len(err.getvalue().splitlines()) == 1), err.getvalue()
