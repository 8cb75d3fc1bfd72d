"""Run folders as bad disks and busy hands leave them: the report names what it leaves out; no one sees a traceback."""

import contextlib
import io
import json
import shutil
import tempfile
from pathlib import Path

import pytest
import yaml
from fuzzing import at_most, examples
from garbling import FILES, change, changes, report, without_figures, write_pristine
from hypothesis import event, given
from hypothesis import strategies as st
from overriding import command
from report_runs import summary_json, write_study
from running import TINY, quiet_machine

from luqrun.cli.results import jobs_table
from luqrun.cli.sweeps import Job
from luqrun.report.pictures import main as pictures
from luqrun.report.records import printable
from luqrun.runs.folder import RunFolder


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    return write_pristine(tmp_path_factory.mktemp("pristine"))


@pytest.fixture(scope="module")
def undrawn():
    with without_figures():
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
            assert err.startswith("luqrun-tables: ")
            return
        # Each run is in a table, left out by name, or (its cell is gone) not of the report's business.
        counted = {row["run"] for path in (outputs / "tables").glob("*.json") for row in json.loads(path.read_text())}
        assert report(outputs / "tables")[0] == 0  # what was written is read again
        left_out = [line for line in out.splitlines() if line.startswith("- ") and ": " in line]
        for path in here:
            named = any(printable(path.name) in line for line in left_out)
            assert path.name in counted or named or _without_cell(path) or "fig1a" in str(path), path


@examples(15)
@given(done=st.lists(changes(*FILES), min_size=1, max_size=3))
def test_the_report_names_what_it_leaves_out(pristine, undrawn, done):
    check_report(pristine, done)


@examples(2)
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
COMMANDS = [(), (), ("study=b", "reuse=true"), ("finetune=fnt1", "resume=base"), ("tracking.log_every=3",)]


@examples(5)
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
        assert jobs_table([Job(["seed=0"], path) for path in folder.glob("outputs/*/*")] or [Job(["seed=0"], run)], 1.0)


@pytest.mark.parametrize("name", ["run.json", "summary.json"])
@pytest.mark.parametrize("content", ["[1]", "3", "{", "[" * 100_000, '{"val/top1": "x", "before_finetune": 3}'])
def test_a_file_that_luqrun_did_not_write_is_named(work, tmp_path, name, content):
    folder = shutil.copytree(work, tmp_path / "work")
    (run,) = (path.parent for path in folder.rglob("run.json"))
    (run / name).write_text(content)
    answer = command(folder, work / "cache", *TINY)
    if name == "run.json" and content.startswith('{"'):  # it lacks everything: nobody knows whose the result is
        assert answer.code == 1
        assert "RESULTS 1" in answer.lines[-1]
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
    assert (ended.value.code, len([line for line in err.splitlines() if "luqrun-pictures: " in line])) == (1, 1)


@examples(8)
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
