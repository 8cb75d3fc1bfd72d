"""The benchmark: how contenders take turns, and what its record and report hold. No timings."""

import dataclasses
import functools
import json
import runpy
import socket
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from luqrun.bench import picture, report, sections, workloads
from luqrun.bench.contenders import block_encoders, encoders, steps
from luqrun.bench.run import RECORD, REPORT, add, driver_version, run
from luqrun.bench.sections import (
    FORMAT_MODELS,
    MEMORY_MODELS,
    MODELS,
    QUICK,
    SCHEMES,
    SECTIONS,
    STEP_PAIRS,
    _fastest,
    _kinds,
)
from luqrun.bench.timing import Contender, Timings, interleave
from luqrun.errors import UserError
from luqrun.runs.folder import provenance
from luqrun.tasks.translation.networks import SIZES
from luqrun.train.profiling import KINDS, OTHER

CPU = torch.device("cpu")
TINY = dataclasses.replace(
    QUICK,
    elements={"cpu": 1000},
    conv_images=1,
    linear_rows=3,
    gemms={"cpu": {"linear": (32, 16, 48)}},
    batches=dict.fromkeys(MODELS["cpu"], 2),
    rounds={"encode": 2, "layer": 1, "gemm": 2, "step": 2},
    profiled=(2, 1),
)


def test_every_contender_has_its_turn_in_every_round():
    turns = []
    taking_part = [Contender(name, lambda name=name: turns.append(name)) for name in "abc"]
    timings = interleave(taking_part, 4, CPU, warm_up=1)
    assert turns[:3] == ["a", "b", "c"]
    rounds = ["".join(turns[start : start + 3]) for start in range(3, len(turns), 3)]
    assert rounds == ["abc", "bca", "cab", "abc"]
    assert all(len(timings.measured(name)) == 4 for name in "abc")


def test_slow_contenders_sit_rounds_out():
    calls = []
    taking_part = [Contender("fast", lambda: None), Contender("slow", lambda: calls.append(1), every=3)]
    timings = interleave(taking_part, 7, CPU, calls=2, settle=1, warm_up=0)
    assert len(calls) == 3 * (1 + 2)  # as many a round as the fast one's
    assert [seconds is not None for seconds in timings.rounds["slow"]] == [True, False, False, True, False, False, True]
    assert len(timings.measured("fast")) == 7


def test_ratios_are_of_common_rounds():
    timings = Timings({"a": [2.0, 4.0, 9.0, 1.0], "b": [1.0, None, 3.0, 4.0]})
    assert timings.ratio("a", "b") == {"median": 2.0, "quartiles": [1.125, 2.5], "min": 1.0}
    assert Timings({"a": [3.0], "b": [1.5]}).ratio("a", "b") == {"median": 2.0, "quartiles": [2.0, 2.0], "min": 2.0}
    record = timings.as_record()
    assert (record["median"], record["min"]) == ({"a": 3.0, "b": 3.0}, {"a": 1.0, "b": 1.0})


def test_what_does_not_fit_is_left_out():
    def too_large():
        raise torch.OutOfMemoryError

    timings = interleave([Contender("large", too_large), Contender("small", lambda: None)], 2, CPU)
    assert list(timings.rounds) == ["small"]
    assert timings.left_out == {"large": "out of memory"}


def test_what_does_not_fit_any_more_is_left_out():
    calls = []

    def grows():
        calls.append(1)
        if len(calls) > 3:
            raise torch.OutOfMemoryError

    timings = interleave([Contender("grows", grows), Contender("small", lambda: None)], 3, CPU, warm_up=1)
    assert len(calls) == 4
    assert list(timings.rounds) == ["small"]
    assert timings.left_out == {"grows": "out of memory"}


def test_what_does_not_compile_is_left_out():
    def backend(graph, inputs):
        raise FileNotFoundError("/somewhere/c++")

    compiled = torch.compile(lambda x: x + 1, backend=backend)
    timings = interleave([Contender("compiled", lambda: compiled(torch.ones(1)))], 2, CPU)
    assert timings.left_out == {"compiled": "does not compile: FileNotFoundError"}  # no path


def test_other_errors_of_contenders_are_errors():
    with pytest.raises(ZeroDivisionError):
        interleave([Contender("wrong", lambda: 1 / 0)], 2, CPU)


def test_profiles_are_taken_in_turns():
    called = []
    contenders = [Contender(name, lambda name=name: called.append(name)) for name in "ab"]
    found = _kinds(contenders, CPU, rounds=3, count=2)
    assert "".join(called) == "aabbbbaaaabb"
    assert found.keys() == {"a", "b"}
    assert all(set(kinds) == {*KINDS, OTHER} and sum(kinds.values()) > 0 for kinds in found.values())


def test_the_fastest_are_compared():
    seconds = {
        "fp32": 4.0,
        "fp32 compiled": 2.0,
        "bf16": 3.0,
        "luq fp32": 6.0,
        "luq fp32 compiled": 8.0,
        "luq bf16": 1.0,
    }
    rounds = {name: [value] * 2 for name, value in {**seconds, "formulas fp32": 0.5}.items()}
    found = {(r["what"], r["against"]): r["median"] for r in _fastest(Timings(rounds))}
    assert found == {
        ("luq fp32, fastest: luq fp32", "fp32, fastest: fp32 compiled"): 3.0,
        ("luq, fastest: luq bf16", "plain, fastest: fp32 compiled"): 0.5,
    }


@pytest.fixture(scope="module", autouse=True)
def _one_commit():
    """What is being edited and committed while the tests run changes nothing for them."""
    known = {**provenance(), "git_commit": "c0ffee", "git_dirty": False}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("luqrun.bench.run.provenance", lambda: known)
        yield


def small_network(config, classes, channels, size) -> nn.Module:
    """Between its first and its last layer one that is quantized."""
    layers = nn.Conv2d(channels, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, classes))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What a whole run writes, of sizes that are small and of one small network in place of each."""
    folder = tmp_path_factory.mktemp("benchmark")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workloads, "build_model", small_network)
        patch.setattr(sections, "TOKENS", dict.fromkeys(sections.TOKENS, (4, 50)))
        patch.setattr(workloads, "MINILM", {**workloads.MINILM, "num_hidden_layers": 1})
        patch.setitem(SIZES, "transformer_tiny", (1, 16, 16, 1, 0.1))
        # As the compiler sees it, without the minutes that its code takes to compile; and without processes.
        patch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
        patch.setattr(sections, "resident_peaks", lambda workload, options, count, allocator: [3 * 2**20] * count)
        run(folder, quick=True, device="cpu", sizes=TINY, log=lambda text: None)
    return folder


@pytest.fixture
def record(folder):
    return json.loads((folder / RECORD).read_text())


def test_the_record_has_all_parts(record):
    assert list(record)[:2] == ["requirements", "ratios"]
    assert {"machine", "versions", "git_commit", "git_dirty", "date", "quick", "sections"} <= record.keys()
    assert record["machine"].keys() >= {"device", "name", "cpu", "threads", "kernels", "isa"}
    assert {"torch", "numba", "python"} <= record["versions"].keys()
    assert list(record["sections"]) == list(SECTIONS)
    for section in ("encode", "layer", "gemm", "step"):
        for case in record["sections"][section].values():
            names = case["rounds"].keys()
            assert names == case["median"].keys() == case["min"].keys()
            assert all(len(rounds) == TINY.rounds[section] for rounds in case["rounds"].values())
    assert all(case["seconds_by_kind"].keys() == case["median"].keys() for case in record["sections"]["step"].values())
    for ratio in record["ratios"]:
        low, high = ratio["quartiles"]
        assert 0 < low <= ratio["median"] <= high
        assert ratio["min"] > 0
    alone = ["resnet8, 1 thread"] if record["machine"]["threads"] > 1 else []
    assert list(record["sections"]["step"]) == ["resnet8", *alone, *MODELS["cpu"][1:]]
    assert "luq fp32 compiled" in record["sections"]["step"]["resnet8"]["median"]
    assert record["versions"]["torch"] == torch.__version__
    assert record["machine"]["codes"].keys() == {"fp32", "bf16"}


def test_every_requirement_of_this_device_is_measured(record):
    rows = report.requirements(record)
    assert len(rows) == len(report.REQUIREMENTS)
    assert {(row["device"], row["measured"] is not None) for row in rows} == {("cpu", True), ("cuda", False)}
    assert rows == record["requirements"]


@pytest.mark.parametrize("each", report.REQUIREMENTS, ids=lambda each: each.what)
def test_every_requirement_can_be_measured(each):
    if each.section == "encode":
        names = {contender.name for contender in encoders(torch.randn(8))[0]}
        assert {name.removesuffix(", bytes/s") for name in (each.name, each.against)} <= names
        return
    if each.section == "formats":
        known = (
            [contender.name for contender in block_encoders(torch.randn(2, 32))] if each.case == "encode" else SCHEMES
        )
        assert each.case in ("encode", *FORMAT_MODELS)
        assert each.name in known
        return
    assert each.case in {"step": MODELS, "memory": MEMORY_MODELS}[each.section][each.device]
    pair = tuple(
        name.removesuffix(", peak").removesuffix(", bytes kept by layers") for name in (each.name, each.against)
    )
    assert pair[0] in steps(torch.device(each.device))
    if pair[1] != "element":
        assert pair in STEP_PAIRS
        assert pair[1] in steps(torch.device(each.device))


def test_the_report_has_a_row_for_each_requirement(folder, record):
    text = (folder / REPORT).read_text()
    first = text.partition("## Numbers to reach")[2].partition("##")[0]
    for row in record["requirements"]:
        (line,) = (line for line in first.splitlines() if f"| {row['what']} |" in line)
        where, what, required, aim, measured, reached = (cell.strip() for cell in line.strip()[1:-1].split("|"))
        assert (where, what) == (report.WHERE[row["device"]], row["what"])
        assert (required, aim) == (row["required"], row["aim"])
        if row["measured"] is None:
            assert measured == "not measured"
            assert reached not in ("yes", "no")
        else:
            assert measured.startswith(f"{row['measured']['median']:.3g}")
            assert reached == ("yes" if row["reached"] else "no")
    assert "quick run" in text


def test_nothing_says_where_it_ran(folder):
    for path in folder.iterdir():
        content = path.read_bytes().decode(errors="replace")
        for private in (str(folder), str(Path.cwd()), str(Path.home()), sys.prefix):
            assert private == "/" or private not in content, path.name
        if path.name != "step.png":
            assert socket.gethostname() not in content or len(socket.gethostname()) < 4, path.name


def test_reached_is_at_most_or_at_least(record):
    record["ratios"] = []
    for each in report.REQUIREMENTS:
        if each.device == "cpu":
            measured = each.required * 0.9
            ratio = {"what": each.name, "against": each.against, **dict.fromkeys(("median", "min"), measured)}
            ratio["quartiles"] = [measured, measured]
            record["ratios"].append({"section": each.section, "case": each.case, **ratio})
    rows = [row for row in report.requirements(record) if row["device"] == "cpu"]
    assert all(row["reached"] == row["required"].startswith("≤") for row in rows)
    assert {row["reached"] for row in rows} == {True, False}


def test_a_later_run_completes_the_record(folder, record, tmp_path):
    (tmp_path / RECORD).write_text(json.dumps(record))
    again = run(tmp_path, quick=True, only=["layer"], device="cpu", sizes=TINY, log=lambda text: None)
    assert list(again["sections"]) == list(SECTIONS)
    assert again["sections"]["encode"] == record["sections"]["encode"]
    assert again["sections"]["layer"] != record["sections"]["layer"]
    assert len(again["ratios"]) == len(record["ratios"])


@pytest.mark.parametrize("change", [{"git_commit": "decade"}, {"git_dirty": True}, {"versions": {"torch": "1.0"}}])
def test_a_record_of_other_code_is_not_completed(record, tmp_path, change, monkeypatch):
    known = {**provenance(), "git_commit": "c0ffee", "git_dirty": False, **change}
    monkeypatch.setattr("luqrun.bench.run.provenance", lambda: known)
    (tmp_path / RECORD).write_text(json.dumps({**record, "git_dirty": known["git_dirty"]}))
    alone = run(tmp_path, quick=True, only=[], device="cpu", sizes=TINY, log=lambda text: None)
    assert alone["sections"] == {}
    assert alone["ratios"] == []


def test_the_drivers_version_is_what_its_tool_says(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert driver_version() == "unknown"
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 580.65.06\necho 580.65.06\n")  # a line a GPU
    tool.chmod(0o755)
    assert driver_version() == "580.65.06"


def test_a_network_of_another_device_is_refused(tmp_path):
    with pytest.raises(UserError, match="models=resnet50: not measured on cpu; allowed there: resnet8, resnet18"):
        run(tmp_path / "out", quick=True, only=["step"], device="cpu", models=["resnet50"])
    assert not (tmp_path / "out").exists()


def test_a_case_measured_again_replaces_the_earlier():
    record = {"sections": {}, "ratios": []}
    add(record, "step", "a", {"date": 1}, [{"what": "x", "against": "y", "median": 1.0, "min": 1.0}])
    add(record, "encode", "b", {"date": 2}, [])
    add(record, "step", "a", {"date": 3}, [{"what": "x", "against": "y", "median": 2.0, "min": 2.0}])
    assert record["sections"] == {"encode": {"b": {"date": 2}}, "step": {"a": {"date": 3}}}
    assert list(record["sections"]) == ["encode", "step"]
    assert [ratio["median"] for ratio in record["ratios"]] == [2.0]


def test_the_picture_shows_every_contender(folder, record):
    pytest.importorskip("matplotlib")
    assert (folder / "step.png").read_bytes().startswith(b"\x89PNG")
    drawn = (folder / "step.svg").read_text()
    for case in (record["sections"]["step"][model] for model in ("resnet8", "resnet18")):
        assert all(f"<!-- {name} -->" in drawn for name in case["seconds_by_kind"])
    assert "![" in (folder / REPORT).read_text()


def test_without_matplotlib_there_is_no_picture(record, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError):
        picture.draw(record, tmp_path)
    (tmp_path / RECORD).write_text(json.dumps(record))
    said = []
    run(tmp_path, quick=True, only=[], device="cpu", log=said.append)
    assert "plot" in said[0]
    assert "![" not in (tmp_path / REPORT).read_text()
    assert not (tmp_path / "step.svg").exists()


def test_the_script_names_what_it_does_not_know(tmp_path, monkeypatch, capsys):
    script = str(Path(__file__).parents[2] / "scripts" / "benchmark.py")
    monkeypatch.setattr(sys, "argv", [script, "--out", str(tmp_path / "out"), "--only", "encode,nonsense"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(script, run_name="__main__")
    assert ended.value.code == 2
    assert "nonsense is not known; allowed: encode, layer, gemm, step, memory" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
