"""The check of a GPU: its order, its time, its table, that lines are independent, and that it finds what is wrong."""

import dataclasses
import json
import runpy
import sys
from functools import partial
from pathlib import Path

import gpu_rows
import pytest
import torch
from torch import nn

from luqrun.bench import exact_gemms, gpu_check, gpu_lines, same_bits, sections, workloads
from luqrun.bench.contenders import Training, steps
from luqrun.bench.gpu_check import DONE, NO_TIME, NOT_MEASURED, RECORD, REPORT, RUNNING, STOPPED, Line, Row, apart, here
from luqrun.bench.report import REQUIREMENTS
from luqrun.errors import UserError
from luqrun.tasks.translation.networks import SIZES

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def line(name, *rows, share=0.5, error=None, took=0.0, clock=None, skip=""):
    """Yields these rows, each after so many seconds of the clock."""

    def found(device, sizes, seconds):
        for row in rows:
            if clock is not None:
                clock[0] += took
            yield row
        if error is not None:
            raise error

    return Line(name, found, share, skip)


def checked(out, *lines, minutes=1.0):
    return gpu_check.run(out, lines, None, CPU, minutes, way=here, log=lambda text: None)


def statuses(out):
    return {each["name"]: each["status"] for each in json.loads((out / RECORD).read_text())["lines"]}


def test_json_and_table_are_written_after_every_row_and_line(tmp_path):
    seen = []

    def look(device, sizes, seconds):
        seen.append((statuses(tmp_path), (tmp_path / REPORT).read_text()))
        yield Row("half", "of it")
        seen.append((statuses(tmp_path), (tmp_path / REPORT).read_text()))

    checked(tmp_path, line("first", Row("one", "1")), Line("second", look, 0.2), line("third"))
    assert [each for each, _ in seen] == [{"first": DONE, "second": RUNNING, "third": NOT_MEASURED}] * 2
    assert ["| one | 1 |" in text for _, text in seen] == [True, True]
    assert ["| half | of it |" in text for _, text in seen] == [False, True]
    assert set(statuses(tmp_path).values()) == {DONE}


@pytest.mark.parametrize("error", [ZeroDivisionError("of what\nthere was"), torch.OutOfMemoryError("of what")])
def test_a_line_that_fails_shows_its_error_and_ends_no_other(tmp_path, error):
    lines = line("bad", Row("kept", "1", True), error=error), line("good", Row("fine", "2", True))
    bad, good = checked(tmp_path, *lines)
    assert (bad.status, bad.right) == (f"failed: {type(error).__name__}: of what", False)
    assert [row.what for row in bad.rows] == ["kept"]
    assert (good.status, good.right) == (DONE, True)
    table = (tmp_path / REPORT).read_text()
    assert f"| **bad** |  | failed: {type(error).__name__}: of what | **no** |" in table
    assert "| fine | 2 | yes |" in table


def test_a_wrong_row_makes_its_line_wrong(tmp_path):
    (found,) = checked(tmp_path, line("mixed", Row("a", "", True), Row("b", "", False), Row("c", "")))
    assert (found.status, found.right) == (DONE, False)
    (nothing,) = checked(tmp_path, line("numbers", Row("a", "1")))
    assert nothing.right is None


def test_lines_keep_to_their_share_of_the_time(tmp_path, monkeypatch):
    clock, left = [1000.0], []
    monkeypatch.setattr(gpu_check.time, "monotonic", lambda: clock[0])

    def ask(device, sizes, seconds):
        left.append(seconds)
        yield Row("left", f"{seconds:g}")

    results = checked(
        tmp_path,
        line("short", Row("a", ""), share=0.4, took=4.0, clock=clock),
        Line("gets what is left", ask, 0.1),
        line("long", *[Row(str(number), "") for number in range(9)], share=0.1, took=20.0, clock=clock),
        line("too late", Row("b", ""), share=0.01),
        line("skipped", Row("c", ""), share=0.1, skip="not run: why"),
        line("last", Row("d", ""), share=0.29),
    )
    assert left == [pytest.approx(0.5 * 60 - 4)]
    assert [each.status for each in results] == [DONE, DONE, STOPPED, NO_TIME, "not run: why", DONE]
    assert len(results[2].rows) == 2  # of 36 seconds the first took 20
    assert results[2].seconds == 40


def test_a_process_that_fails_or_crashes_says_how():
    failing = apart(Line("fails", gpu_rows.fail, 1), CPU, None, 300)
    assert next(failing) == Row("before", "found")
    with pytest.raises(gpu_check.LineError, match=r"^ValueError: on cpu$"):
        next(failing)
    crashing = apart(Line("crashes", gpu_rows.crash, 1), CPU, None, 300)
    assert next(crashing) == Row("before", "found")
    with pytest.raises(gpu_check.LineError, match="ended by itself: SIGSEGV"):
        next(crashing)


def test_what_a_process_started_ends_with_it():
    rows = apart(Line("hangs", gpu_rows.hang, 1), CPU, None, 300)
    pid = next(rows).found
    assert is_alive(pid)
    rows.close()
    assert not is_alive(pid)
    with pytest.raises(gpu_check.TimeUp):
        list(apart(Line("hangs", gpu_rows.hang, 1), CPU, None, 0.01))


def is_alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in "ZX"


def test_out_has_to_be_a_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"out=.*file is not a folder"):
        checked(tmp_path / "file")


def small_network(config, classes, channels, size) -> nn.Module:
    layers = nn.Conv2d(channels, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(8, classes))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the whole check writes on a CPU, of one small network in place of each."""
    folder = tmp_path_factory.mktemp("check")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workloads, "build_model", small_network)
        patch.setitem(sections.TOKENS, "transformer_tiny", (4, 50))
        patch.setitem(SIZES, "transformer_tiny", (1, 16, 16, 1, 0.1))
        lines = gpu_lines.lines(CPU)
        gpu_check.run(folder, lines, gpu_lines.TINY, CPU, 60, way=here, log=lambda text: None)
    return folder


def test_every_line_runs_on_a_cpu_what_matters_first(folder):
    found = statuses(folder)
    assert list(found) == [
        *("machine", "kernels against the reference, bit for bit"),
        *("exact GEMMs: convolutions", "exact GEMMs: linear layers", "exact GEMMs: cuDNN's benchmark"),
        "pytest -m gpu",
        *("encode against a copy's bandwidth", "step and peak memory: resnet8"),
        *("step and peak memory: transformer_tiny", "Triton's tests on the device"),
    ]
    assert {name for name, status in found.items() if status != DONE} == {
        "pytest -m gpu",
        "Triton's tests on the device",
    }
    assert found["pytest -m gpu"] == "not run: needs a GPU"
    lines = {each["name"]: each for each in json.loads((folder / RECORD).read_text())["lines"]}
    right = [lines[name]["right"] for name in list(found)[1:4]]
    assert right == [True] * 3
    best = lines["exact GEMMs: cuDNN's benchmark"]["rows"][-1]["found"]
    assert best.count(" ms)") == len(exact_gemms.BENCHMARK_SETTINGS)
    bits = [row["what"] for row in lines["kernels against the reference, bit for bit"]["rows"]]
    assert bits[: len(same_bits.KERNELS)] == list(same_bits.KERNELS)
    step = [row["what"] for row in lines["step and peak memory: resnet8"]["rows"]]
    assert step[:3] == ["bf16", "luq bf16", "resnet8: luq bf16 against bf16"]
    assert step[-1] == "resnet8: luq bf16, peak against bf16, peak"


def test_the_table_has_all_lines_and_rows(folder):
    table = (folder / REPORT).read_text()
    lines = json.loads((folder / RECORD).read_text())["lines"]
    assert "On a CPU" in table
    rows = [row for row in table.splitlines() if row.startswith("|")]
    assert len(rows) == 2 + sum(1 + len(each["rows"]) for each in lines)
    assert all(row.count(" | ") == 3 for row in rows)


def test_the_lines_of_a_gpu_share_the_time_and_measure_what_is_required():
    lines = gpu_lines.lines(CUDA)
    assert sum(each.share for each in lines) == pytest.approx(1)
    assert not any(each.skip for each in lines)
    assert {"step and peak memory: resnet50", "step and peak memory: transformer_base"} <= {each.name for each in lines}
    assert set(gpu_lines.FULL.steps) <= steps(CUDA).keys()
    for each in REQUIREMENTS:
        if each.device == "cuda" and "formulas" not in each.name and each.section in ("step", "memory"):
            names = {name.removesuffix(", peak") for name in (each.name, each.against)}
            assert each.case in gpu_lines.FULL.models
            assert names <= set(gpu_lines.FULL.steps)
            assert gpu_lines.FULL.steps[0] in each.against


def test_a_requirement_of_a_gpu_judges_its_ratio():
    ratio = {"what": "luq bf16 compiled", "against": "bf16 compiled", "quartiles": [1.0, 1.5], "min": 1.0}
    good, bad = (gpu_lines.judged(CUDA, "step", "resnet50", {**ratio, "median": median}) for median in (1.2, 1.3))
    assert (good.right, bad.right) == (True, False)
    assert good.found == "1.2 (1 to 1.5); required ≤ 1.25, aim ≤ 1"
    for device, model in ((CUDA, "transformer_base"), (CPU, "resnet50")):
        assert gpu_lines.judged(device, "step", model, {**ratio, "median": 9.0}).right is None


def test_a_step_of_transformer_base(monkeypatch):
    monkeypatch.setitem(SIZES, "transformer_base", (1, 16, 16, 1, 0.1))
    monkeypatch.setitem(sections.TOKENS, "transformer_base", (4, 50))
    batches = {**sections.FULL.batches, "transformer_base": 2}
    workload = sections.workload_of("transformer_base", dataclasses.replace(sections.FULL, batches=batches))
    training = Training(workload, CPU, "luq", True)
    before = [parameter.clone() for parameter in training.model.parameters()]
    training()
    changed = [not torch.equal(*pair) for pair in zip(before, training.model.parameters(), strict=True)]
    assert sum(changed) > len(changed) / 2


def test_what_pytest_says_is_counted():
    said = (
        "tests/quant/test_gpu.py::test_a[fp32 and bf16] PASSED   [ 33%]\n"
        "tests/quant/test_gpu.py::test_b FAILED [ 66%]\n"
        "tests/quant/test_gpu.py::test_c SKIPPED (why) [100%]\n"
        "FAILED tests/quant/test_gpu.py::test_b - AssertionError: 1\n"
    )
    row = gpu_lines.counted(said, "exit code 1")
    assert row.found == "1 passed, 1 failed, 0 error, 1 skipped (exit code 1): tests/quant/test_gpu.py::test_b"
    assert row.right is False
    assert row.numbers["reasons"] == ["tests/quant/test_gpu.py::test_b - AssertionError: 1"]
    passed = said.partition("\n")[0]
    assert gpu_lines.counted(passed, "exit code 0").right is True
    assert gpu_lines.counted(passed, STOPPED).right is True
    assert gpu_lines.counted(passed, "exit code 2").right is False
    assert gpu_lines.counted("", STOPPED).right is False


def test_tests_run_in_a_process_of_their_own():
    arguments = ("tests/test_rooms.py", "-k", "circle")
    (row,) = partial(gpu_lines.tests, arguments=arguments)(CPU, None, 300)
    assert row.found == "1 passed, 0 failed, 0 error, 0 skipped (exit code 0)"


def test_without_a_gpu_the_script_says_so_in_one_line(tmp_path, monkeypatch, capsys):
    script = str(Path(__file__).parents[2] / "scripts" / "gpu_check.py")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", [script, "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(script, run_name="__main__")
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out").exists()
