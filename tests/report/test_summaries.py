"""Summaries of runs whose folders are gone: read as the folders are, each run once, and what is left out."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import yaml
from report_runs import DIVERGED, write_measured, write_run, write_study
from shell import ROOT

from luqrun.report import summaries
from luqrun.report.command import main
from luqrun.report.records import read_folders
from luqrun.report.summaries import read_inputs, read_summaries
from luqrun.runs.identity import LAYOUT, deciding_data, deciding_settings


def publish(outputs, folder, name="embedded-fig2") -> Path:
    """The runs of a folder of studies as one file of summaries."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(summaries.to_json(read_inputs([outputs])[0]))
    return path


def publish_one(tmp_path, **more) -> Path:
    """The summary of one run, without its folder."""
    write_run(tmp_path / "outputs", **{"name": "one", **more})
    return publish(tmp_path / "outputs", tmp_path / "published")


def change(path, **values) -> None:
    """Change fields of the entries; a value of ... deletes."""
    entries = [{**entry, **values} for entry in json.loads(path.read_text())]
    entries = [{name: value for name, value in entry.items() if value is not ...} for entry in entries]
    path.write_text(json.dumps(entries))


def only_left_out(path):
    """The single entry that is left out."""
    records, (left_out,) = read_summaries(path.parent)
    assert records == []
    return left_out


@pytest.fixture
def outputs(tmp_path):
    """Two tables, with a diverged run, missing ones, and what was measured."""
    folder = tmp_path / "outputs"
    write_study(folder, "fig2", {"fp32": [82.0, 82.6], "luq": [80.1, DIVERGED], "uniform_sr": [DIVERGED]})
    write_run(folder, "table2", "resnet8", "luq", 0, 79.1234567890123, more=["schedule.lr=0.2", "quant.skip=[a, b]"])
    write_measured(folder)
    return folder


def test_tables_of_summaries_are_those_of_the_folders(outputs, tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("scipy")
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    assert main([str(outputs), "--html", "--out", str(one)]) == 0
    assert main([str(one), "--html", "--out", str(two)]) == 0
    assert main([str(one), str(outputs), "--html", "--out", str(three)]) == 0
    names = {path.name for path in one.iterdir()}
    assert {"embedded-fig2.json", "embedded-fig2.svg", "embedded-table2-cells.csv", "table1.json", "tables.md"} <= names
    for other in (two, three):
        assert {path.name for path in other.iterdir()} == names
        for name in names - {"embedded.html", "measured.html"}:  # a page shows the config as its run wrote it
            assert (other / name).read_bytes() == (one / name).read_bytes(), name
    assert (three / "embedded.html").read_bytes() == (one / "embedded.html").read_bytes()  # the folder counts


def test_a_record_comes_back_as_it_was(outputs, tmp_path):
    records, _ = read_inputs([outputs])
    publish(outputs, tmp_path / "published")
    again, left_out = read_summaries(tmp_path / "published")
    assert left_out == []
    assert len(again) == len(records) == 7
    plain = ("study", "table", "scale", "row", "column", "seed", "value", "more", "curve",
             "rounding", "overrides", "command", "diverged")  # fmt: skip
    for record, other in zip(records, again, strict=True):
        assert all(getattr(record, name) == getattr(other, name) for name in plain)
        assert other.path == tmp_path / "published" / record.study / record.path.name
        assert record.config == other.config
        assert all(record.run[name] == other.run[name] for name in summaries.KEPT if name in record.run)


def test_a_table_is_completed_from_summaries_and_folders(tmp_path):
    write_run(tmp_path / "outputs", seed=0, name="one")
    publish(tmp_path / "outputs", tmp_path / "published")
    shutil.rmtree(tmp_path / "outputs")
    write_run(tmp_path / "outputs", seed=1, name="two")
    assert read_folders(tmp_path / "published") == ([], [])
    records, left_out = read_inputs([tmp_path / "outputs", tmp_path / "published"])
    assert ([record.path.name for record in records], left_out) == (["two", "one"], [])
    assert main([str(tmp_path / "outputs"), str(tmp_path / "published"), "--out", str(tmp_path / "published")]) == 0
    found = json.loads((tmp_path / "published" / "embedded-fig2.json").read_text())
    assert [(entry["run"], entry["seed"]) for entry in found] == [("one", 0), ("two", 1)]


@pytest.mark.parametrize("top1", [80.0, DIVERGED])
def test_the_same_run_in_its_folder_and_as_a_summary_is_counted_once(tmp_path, top1):
    path = publish_one(tmp_path, top1=top1)
    shutil.copy(path, path.with_name("copy.json"))
    for inputs in (["outputs", "published"], ["published", "outputs"]):
        (record,), left_out = read_inputs([tmp_path / name for name in inputs])
        assert left_out == []
        assert record.path == tmp_path / "outputs" / "embedded" / "fig2" / "one"


@pytest.mark.parametrize(("top1", "shown"), [(79.0, "80.0, 79.0"), (DIVERGED, "80.0, diverged")])
def test_a_summary_that_says_something_else_than_the_folder_counts_neither(tmp_path, top1, shown):
    publish_one(tmp_path, top1=top1)
    shutil.rmtree(tmp_path / "outputs")
    path = write_run(tmp_path / "outputs", top1=80.0, name="one")
    other = write_run(tmp_path / "outputs", seed=1)
    records, left_out = read_inputs([tmp_path / "outputs", tmp_path / "published"])
    assert [record.path for record in records] == [other]
    assert [each.path for each in left_out] == [path, tmp_path / "published" / "embedded" / "fig2" / "one"]
    assert {each.reason for each in left_out} == {f"this run is there 2 times, with different results: {shown}"}


def test_of_a_run_of_two_results_the_later_counts(tmp_path):
    path = publish_one(tmp_path, top1=79.0)
    outputs = tmp_path / "again"
    run = write_run(outputs, top1=80.0, name="one")
    change_run = {**json.loads((run / "run.json").read_text()), "results": 2}
    (run / "run.json").write_text(json.dumps(change_run))
    (record,), (left_out,) = read_inputs([path.parent, outputs])
    assert (record.value, record.results) == (80.0, 2)
    assert left_out.reason == "of RESULTS 1: its table has runs of RESULTS 2 too"
    summary = summaries.summary(record)
    assert summary["results"] == 2


def test_another_run_of_the_cell_as_a_summary_is_a_duplicate(tmp_path):
    publish_one(tmp_path)
    shutil.rmtree(tmp_path / "outputs")
    write_run(tmp_path / "outputs", name="two")
    records, left_out = read_inputs([tmp_path / "outputs", tmp_path / "published"])
    assert records == []
    assert {each.path.name: each.reason.partition(":")[0] for each in left_out} == {
        "one": "duplicated",
        "two": "duplicated",
    }


def test_no_places_of_the_machine_but_the_data_set_that_is_a_folder(tmp_path):
    for seed, (name, root) in enumerate([("cifar10", "/data/of/me"), ("cifar10", "cifar"), ("folder", "/data/of/all")]):
        path = write_run(tmp_path / "outputs", seed=seed)
        config = yaml.safe_load((path / "config.yaml").read_text())
        config["dataset"] |= {"name": name, "root": root}
        config["resume"] = "/checkpoints/of/me/last.pt" if seed else "auto"
        (path / "config.yaml").write_text(yaml.safe_dump(config))
    path = publish(tmp_path / "outputs", tmp_path / "published")
    assert "of/me" not in path.read_text()
    configs = [entry["config"] for entry in json.loads(path.read_text())]
    assert [config["dataset"].get("root") for config in configs] == [None, "cifar", "/data/of/all"]
    assert [config.get("resume") for config in configs] == ["auto", None, None]


def test_what_is_left_out_stays_in_its_file(tmp_path):
    write_run(tmp_path / "outputs", seed=1, name="two")
    path = publish_one(tmp_path)
    good, bad = json.loads(path.read_text())
    bad["status"] = "running"
    path.write_text(json.dumps([bad, "x", good, good, {"run": []}]))
    for _ in range(2):
        main([str(path.parent), "--out", str(path.parent)])
        assert json.loads(path.read_text()) == [good, bad, "x", {"run": []}]
        assert "incomplete: running" in (path.parent / "findings.md").read_text()
    main([str(path.parent), "--out", str(tmp_path / "elsewhere")])
    assert json.loads((tmp_path / "elsewhere" / "embedded-fig2.json").read_text()) == [good]


def test_other_files_are_not_summaries(tmp_path):
    path = publish_one(tmp_path)
    (path.parent / "benchmark.json").write_text('{"ratios": [1]}')
    (path.parent / "more").mkdir()
    shutil.copy(path, path.parent / "more")
    shutil.copy(path, path.parent / "embedded-fig2.txt")
    records, left_out = read_summaries(path.parent)
    assert (len(records), left_out) == (1, [])


@pytest.mark.parametrize("content", [b"", b"[", b'[{"run": 1}', b"\xff\xfe", b"[" * 100_000, b"[" + b"9" * 5000 + b"]"])
def test_a_file_that_cannot_be_read_is_named(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    assert only_left_out(path).path == path
    assert only_left_out(path).reason.startswith("it cannot be read (")


@pytest.mark.parametrize("entry", [None, 3, "x", [], {}, {"run": "a"}, {"run": 1, "study": "a"}, {"run": "a\nb"}])
def test_an_entry_without_a_name_is_counted_off(tmp_path, entry):
    path = publish_one(tmp_path)
    path.write_text(json.dumps([*json.loads(path.read_text()), entry]))
    (record,), (left_out,) = read_summaries(path.parent)
    assert record.path.name == "one"
    assert left_out.path == path / "entry 2"
    assert left_out.reason == "embedded-fig2.json: it does not say which run of which study it is"


@pytest.mark.parametrize(
    ("study", "run"), [("/etc", "a"), ("../x", "a"), ("", "a"), ("x", "a/b"), ("x", ".."), ("x", "")]
)
def test_an_entry_has_no_place_elsewhere(tmp_path, study, run):
    path = publish_one(tmp_path)
    change(path, study=study, run=run)
    assert only_left_out(path).path == path / "entry 1"


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"top1": float("nan")}, "it holds NaN or an infinite number"),
        ({"loss": float("inf")}, "it holds NaN or an infinite number"),
        ({"top1": 101}, "val/top1 is 101"),
        ({"top1": None}, "embedded-fig2.json has no val/top1"),
        ({"top1": 79.0}, "incomplete: the curve of embedded-fig2.json does not end in the val/top1"),
        ({"top5": "97"}, "embedded-fig2.json is damaged (val/top5 is '97')"),
        ({"metric": "top1"}, "embedded-fig2.json is damaged (metric is 'top1')"),
        ({"curve": ...}, "its curve is damaged"),
        ({"curve": [4.0, "x", 80.0]}, "its curve is damaged"),
        ({"curve": []}, "incomplete: the curve of embedded-fig2.json does not end in the val/top1"),
        ({"status": "running"}, "incomplete: running"),
        ({"status": "diverged"}, "it diverged, and has a val/top1 all the same"),
        ({"command": ...}, "embedded-fig2.json is damaged"),
        ({"command": "luqrun 'seed=0"}, "embedded-fig2.json is damaged"),
        ({"git_commit": 3}, "embedded-fig2.json is damaged"),
        ({"config": ...}, "its config is not a configuration"),
        ({"config": {}}, "its config does not say which cell of which table this is"),
        ({"config": {"cell": None}}, "its config does not say which cell of which table this is"),
        ({"config": {"cell": {"table": "fig9"}}}, "its table fig9 is not known; known: table1, "),
        ({"rounding": [1]}, "embedded-fig2.json is damaged"),
        ({"seed": 1}, "its cell or seed is not that of its config"),
        ({"row": "fp32"}, "its cell or seed is not that of its config"),
        ({"table": ...}, "its cell or seed is not that of its config"),
    ],
)  # fmt: skip
def test_an_entry_that_is_not_as_it_was_written_is_left_out(tmp_path, values, reason):
    path = publish_one(tmp_path)
    change(path, **values)
    left_out = only_left_out(path)
    assert left_out.path == path.parent / "embedded" / "fig2" / "one"
    assert left_out.reason.startswith(f"embedded-fig2.json: {reason}")


def test_a_config_without_end_is_left_out(tmp_path):
    path = publish_one(tmp_path)
    entry = json.loads(path.read_text())[0]
    deep = json.dumps({**entry["config"], "deep": "DEEP"}).replace('"DEEP"', "[" * 600 + "]" * 600)
    path.write_text("[" + json.dumps({**entry, "config": "CONFIG"}).replace('"CONFIG"', deep) + "]")
    assert "configuration" in only_left_out(path).reason or "cannot be read" in only_left_out(path).reason


PUBLISHED = sorted((ROOT / "outputs" / "published").glob("*-*.json"))


@pytest.mark.skipif(not PUBLISHED, reason="only a checkout has outputs/published")
@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_published_settings_are_those_of_which_the_run_id_was_made(path):
    entries = json.loads(path.read_text())
    for entry in (entries[0], entries[-1]):
        if entry["config"]["dataset"]["name"] == "folder":  # it is also of where the images were, which is not told
            continue
        decides = deciding_settings(entry["config"])
        if entry.get("layout", 1) == LAYOUT:
            decides = [decides, deciding_data(entry["data"]), entry["world_sizes"][-1], entry["results"]]
        text = json.dumps(decides, sort_keys=True)
        assert entry["run"].endswith("-" + hashlib.sha256(text.encode()).hexdigest()[:8])


def test_summaries_of_the_scale_of_glyphs_are_read(tmp_path):
    path = publish_one(tmp_path, scale="glyphs", table="table2", row="resnet8", column="luq")
    now = json.loads(path.read_text())[0]
    assert (now["scale"], now["study"]) == ("embedded", "glyphs/table2")
    command = "luqrun seed=0 quant=resnet8 +experiment=table2/glyphs"
    change(
        path,
        scale="glyphs",
        command=command,
        config={**now["config"], "cell": {**now["config"]["cell"], "scale": "glyphs"}},
    )
    (record,), left_out = read_summaries(path.parent)
    assert left_out == []
    assert (record.scale, record.command) == ("embedded", now["command"])
