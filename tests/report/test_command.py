"""luqrun-tables: what it writes, prints and exits with."""

import csv
import json
import re
import runpy
import subprocess
import sys
import tomllib
from html import escape
from importlib.metadata import EntryPoint
from statistics import fmean, stdev

import pytest
from report_runs import DIVERGED, ORDERED, hide, write_measured, write_run, write_study, write_two_tables
from shell import ROOT, environment

from luqrun.report.command import main

# A recipe that diverges shows something from five seeds on.
OF_FIVE_SEEDS = {row: [*values, *values[:2]] for row, values in ORDERED.items()}


def report(outputs, *arguments) -> int:
    return main([str(outputs), *map(str, arguments)])


def files_of(name) -> set[str]:
    """Those of a table without a figure."""
    return {f"{name}-cells.csv", *(f"{name}.{ending}" for ending in ("csv", "json", "md"))}


def refused(capsys, *arguments) -> str:
    """The single line with which the command ends."""
    with pytest.raises(SystemExit) as ended:
        main([str(each) for each in arguments])
    text = capsys.readouterr()
    assert ended.value.code == 1
    assert text.err.startswith("luqrun-tables: ")
    assert text.err.count("\n") == 1
    return text.err.removeprefix("luqrun-tables: ").strip()


def test_unknown_tables_are_refused_with_the_known_ones(tmp_path, capsys):
    text = refused(capsys, tmp_path, "--table", "fig2", "--table", "fig3")
    assert text.startswith("table fig3 is not known; allowed: table1, fig1a, ")
    assert not (tmp_path / "tables").exists()


def test_runs_of_unknown_tables_are_left_out_with_the_known_ones(tmp_path, capsys):
    write_run(tmp_path, "fig9")
    assert main([str(tmp_path)]) == 0
    assert "its table fig9 is not known; known: table1, " in capsys.readouterr().out


def test_what_is_no_folder_of_studies_is_refused(tmp_path, capsys):
    path = write_run(tmp_path)
    assert "nowhere is not a folder" in refused(capsys, tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    assert "is not a folder" in refused(capsys, path / "run.json")
    assert "is a run; give the folder that holds its study" in refused(capsys, path)


def test_the_script_ends_with_the_same_codes(tmp_path):
    def script(*arguments):
        command = [sys.executable, ROOT / "scripts" / "tables.py", *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=environment(tmp_path))

    wrong = script(tmp_path, "--table", "fig3")
    assert (wrong.returncode, wrong.stdout, wrong.stderr.count("\n")) == (1, "", 1)
    assert wrong.stderr.startswith("luqrun-tables: table fig3 is not known; allowed: ")


@pytest.mark.parametrize("script", ["tables", "pictures", "export"])
def test_what_is_installed_is_what_the_script_calls(script):
    commands = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    function = EntryPoint(f"luqrun-{script}", commands[f"luqrun-{script}"], "console_scripts").load()
    assert runpy.run_path(str(ROOT / "scripts" / f"{script}.py"))["main"] is function


def test_help_is_printed(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    assert "95%" in capsys.readouterr().out


def test_empty_outputs_say_how_to_begin(tmp_path, capsys):
    assert report(tmp_path) == 0
    assert "no runs of tables under" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "tables").iterdir()) == ["findings.md", "tables.md"]
    assert report(tmp_path, "--check") == 1  # what is not there does not hold


def test_a_table_of_numbers_needs_no_extra(tmp_path, capsys, monkeypatch):
    hide(monkeypatch, "matplotlib", "scipy")
    write_run(tmp_path, "table2", "resnet8", "fp32", 0, 80.0)
    write_run(tmp_path, "table2", "resnet8", "luq", 0, 79.25)
    write_run(tmp_path, "table2", "resnet8", "luq", 1, status="running", name="going")
    assert report(tmp_path, "--html") == 0
    printed, out = capsys.readouterr().out, tmp_path / "tables"
    names = {"tables.md", "findings.md", "embedded.html", *files_of("embedded-table2")}
    assert {path.name for path in out.iterdir()} == names
    assert "| resnet8, luq | 79.2 (1); 2 missing | −0.8 (1) | 69.09 (ResNet-18) | −0.61 |" in printed
    assert "luqrun -m +experiment=table2/embedded model=resnet8 seed=1,2 quant=luq\n" in printed
    assert (out / "embedded-table2.md").read_text() in printed
    assert (out / "findings.md").read_text() in printed
    assert "embedded/table2/going: incomplete: running" in (out / "findings.md").read_text()


def test_figures_without_matplotlib_name_the_extra(tmp_path, capsys, monkeypatch):
    hide(monkeypatch, "matplotlib")
    write_run(tmp_path)
    assert refused(capsys, tmp_path) == "figures need matplotlib: pip install 'luqrun[plot]'"


def test_summaries_hold_what_stays_when_the_folders_are_gone(tmp_path):
    write_run(tmp_path, "table2", "resnet8", "luq", 1, 79.25, name="one")
    write_run(tmp_path, "table2", "resnet8", "luq", 0, DIVERGED, name="two")
    report(tmp_path)
    diverged, finished = json.loads((tmp_path / "tables" / "embedded-table2.json").read_text())
    assert (finished["run"], finished["status"], finished["top1"], finished["seed"]) == ("one", "finished", 79.25, 1)
    assert finished["curve"] == [4.0, 30.5, 79.25]
    assert (finished["git_commit"], finished["git_dirty"], finished["versions"]["torch"]) == ("c0ffee", False, "2.15.0")
    assert (diverged["status"], diverged["top1"], diverged["diverged_at_step"]) == ("diverged", None, 123)
    assert str(tmp_path) not in (tmp_path / "tables" / "embedded-table2.json").read_text()


def test_two_tables_of_one_study_do_not_overwrite_each_other(tmp_path):
    write_run(tmp_path, "table2", "resnet8", "luq", study="mine", name="one")
    write_run(tmp_path, "table6", "resnet8", "luq", study="mine", name="two")
    write_run(tmp_path, "table6", "resnet8", "luq", study="other", name="three")
    report(tmp_path)
    names = {path.name for path in (tmp_path / "tables").glob("*.md")}
    assert names == {"mine-table2-embedded.md", "mine-table6-embedded.md", "other.md", "findings.md", "tables.md"}


def test_studies_that_are_called_alike_do_not_overwrite_each_other(tmp_path, capsys):
    studies = ("a/b", "a-b", "a-b-cells", "findings", "table1", "tables")
    for number, study in enumerate(studies):
        write_run(tmp_path, "table2", "resnet8", "luq", study=study, top1=float(number))
    report(tmp_path)
    out = tmp_path / "tables"
    found = [json.loads(path.read_text())[0]["study"] for path in out.glob("*.json")]
    assert sorted(found) == sorted(studies)
    assert len(list(out.glob("*.csv"))) == 2 * len(studies)
    for path in out.glob("*.json"):
        with path.with_suffix(".csv").open(newline="") as file:
            assert next(csv.DictReader(file))["study"] in (out / f"{path.stem}.md").read_text()
    assert (out / "findings.md").read_text() in capsys.readouterr().out


def test_only_the_tables_that_were_asked_for(tmp_path, capsys):
    write_run(tmp_path, "table2", "resnet8", "luq")
    write_run(tmp_path, "table6", "resnet8", "luq", study="other/table6")
    assert report(tmp_path, "--table", "table6", "--out", tmp_path / "there", "--html") == 0
    assert "Table 2" not in capsys.readouterr().out
    names = {path.name for path in (tmp_path / "there").iterdir()}
    assert names == {*files_of("other-table6"), "tables.md", "findings.md", "other.html"}
    assert not (tmp_path / "tables").exists()


def test_one_table_alone_is_not_written_where_the_others_are(tmp_path, capsys):
    write_run(tmp_path, "table2", "resnet8", "luq")
    write_run(tmp_path, "table6", "resnet8", "luq")
    out = tmp_path / "published"
    assert report(tmp_path, "--out", out) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert "--out" in refused(capsys, tmp_path, out, "--table", "table6", "--out", out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert report(out, "--table", "table6", "--out", tmp_path / "there") == 0


def test_a_second_report_replaces_the_first(tmp_path):
    write_run(tmp_path, "table2", "resnet8", "luq", 0)
    report(tmp_path, "--html")
    first = {path.name: path.read_bytes() for path in (tmp_path / "tables").iterdir()}
    report(tmp_path, "--html")
    assert {path.name: path.read_bytes() for path in (tmp_path / "tables").iterdir()} == first
    write_run(tmp_path, "table2", "resnet8", "luq", 1, DIVERGED)
    report(tmp_path, "--html")
    second = {path.name: path.read_bytes() for path in (tmp_path / "tables").iterdir()}
    assert first.keys() == second.keys()
    assert b"diverged (1 of 2)" in second["embedded-table2.md"]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    for package in ("matplotlib", "scipy"):
        pytest.importorskip(package)
    return write_two_tables(tmp_path_factory.mktemp("outputs"))


@pytest.fixture(scope="module")
def out(study, tmp_path_factory):
    """The report on it."""
    folder = tmp_path_factory.mktemp("tables")
    assert report(study, "--html", "--out", folder) == 0
    return folder


def test_check_is_zero_where_every_claim_holds(tmp_path, capsys):
    pytest.importorskip("scipy")
    pytest.importorskip("matplotlib")
    write_study(tmp_path, "fig2", OF_FIVE_SEEDS)
    write_run(tmp_path, "fig2", "luq", seed=5, top1=float("nan"))
    assert report(tmp_path, "--check") == 0
    printed = capsys.readouterr().out
    assert printed.count(": holds (") == 5
    assert "holds (diverged: luq in 0 of 5 seeds, uniform_sr in 5 of 5)" in printed
    assert "5 claims about trainings, each tested alone, without a correction for their number" in printed
    assert "luq-top1-seed5-0123abcd: summary.json holds NaN" in printed


def test_check_takes_what_is_not_contradicted(tmp_path, capsys):
    pytest.importorskip("scipy")
    samples = {"fp2_smp1": [50.0, 51.0, 52.0]}
    samples |= {f"fp2_{scope}{n}": [50.5, 50.0, 52.5] for scope in ("smp", "both") for n in (2, 4, 8, 16)}
    write_study(tmp_path, "fig5", {**samples, "forward_only": [50.1, 50.2, 52.3]})
    pytest.importorskip("matplotlib")
    assert report(tmp_path, "--check") == 0
    printed = capsys.readouterr().out
    assert (printed.count(": not contradicted ("), printed.count(": holds (")) == (8, 1)


def test_check_is_one_where_a_claim_does_not_hold(study, tmp_path, capsys):
    assert report(study, "--table", "table2", "--check", "--out", tmp_path / "tables") == 1  # runs are missing
    luq = [76.0, 77.5, 75.4, 76.0, 77.5]  # FP4 + SU is above it
    write_study(tmp_path, "fig2", {**OF_FIVE_SEEDS, "luq": luq})
    capsys.readouterr()
    assert report(tmp_path, "--check") == 1
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == "--check: 1 of 5 claims are not shown in these runs"
    assert "LUQ is above FP4 + SU: contradicted" in printed
    assert report(tmp_path) == 0  # told, but no failure


def test_the_files_of_a_figure(out):
    assert {path.name for path in out.iterdir()} == {
        *files_of("embedded-fig2"), "embedded-fig2.png", "embedded-fig2.svg", *files_of("embedded-table2"),
        "tables.md", "findings.md", "embedded.html",
    }  # fmt: skip
    with (out / "embedded-fig2.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 31
    assert sum(row["status"] == "finished" for row in rows) == 16
    assert sum(row["status"] == "diverged" for row in rows) == 3
    assert {row["value"] for row in rows if row["status"] == "missing"} == {""}
    assert {row["metric"] for row in rows if row["value"]} == {"top1"}
    assert json.loads((out / "embedded-fig2.json").read_text())[0]["status"] == "finished"


def test_the_file_of_cells_holds_what_the_table_shows(out):
    with (out / "embedded-fig2-cells.csv").open(newline="") as file:
        rows = {row["row"]: row for row in csv.DictReader(file)}
    assert list(rows)[:2] == ["fp32", "biased_log"]
    values = [80.1, 80.5, 79.6]
    differences = [ours - base for ours, base in zip(values, ORDERED["fp32"], strict=True)]
    luq, sr = rows["luq"], rows["uniform_sr"]
    for names, numbers in ((("mean", "deviation"), values), (("difference", "difference_deviation"), differences)):
        assert [float(luq[name]) for name in names] == pytest.approx([fmean(numbers), stdev(numbers)], abs=1e-4)
    assert (luq["runs"], luq["diverged"], luq["missing"], luq["n"], luq["difference_n"]) == ("3", "0", "2", "3", "3")
    assert (luq["paper"], luq["paper_model"], luq["paper_difference"]) == ("75.42", "ResNet-50", "-1.08")
    assert (sr["runs"], sr["diverged"], sr["mean"], sr["n"], sr["difference"]) == ("3", "3", "", "", "")
    assert (sr["paper"], sr["paper_model"], rows["fp32"]["difference"]) == ("", "diverges", "")
    with (out / "embedded-table2-cells.csv").open(newline="") as file:
        single = next(row for row in csv.DictReader(file) if row["runs"] == "1")
    assert (single["mean"], single["deviation"], single["n"]) == ("79.25", "", "1")


def test_a_table_says_which_command_makes_all_of_it(tmp_path):
    pytest.importorskip("matplotlib")
    more = ["dataset=folder", "dataset.root=my images", "schedule.epochs=5"]
    write_study(tmp_path, "fig2", {"fp32": [82.0, 82.6], "luq": [80.1]}, scale="cifar", more=more)
    write_run(tmp_path, "fig2", "luq", "top1", 7, 80.0, scale="cifar", more=[*more, "device=cpu"])
    write_run(tmp_path, "table2", "resnet8", "luq")  # of one seed and recipe, which the experiment goes through
    write_run(tmp_path, "fig2", "luq", scale="mine")
    assert report(tmp_path, "--html") == 0
    out = tmp_path / "tables"
    wanted = "luqrun -m +experiment=fig2/cifar dataset=folder 'dataset.root=my images' schedule.epochs=5"
    assert f"```\n{wanted}\n```" in (out / "cifar-fig2.md").read_text()
    assert f"<pre>{escape(wanted)}</pre>" in (out / "cifar.html").read_text()
    assert "```\nluqrun -m +experiment=table2/embedded quant=resnet8\n```" in (out / "embedded-table2.md").read_text()
    assert "one command" not in (out / "mine-fig2.md").read_text()  # there is no such experiment


def test_what_is_measured_has_its_files(tmp_path):
    write_measured(tmp_path)
    report(tmp_path)
    out = tmp_path / "tables"
    names = {"table1.md", "table1.csv", "table1.json", "fig1a.md", "findings.md", "tables.md"}  # what fig1a lacks
    assert {each.name for each in out.iterdir()} == names
    with (out / "table1.csv").open(newline="") as file:
        (numbers,) = csv.DictReader(file)
    assert (numbers["quantizer"], numbers["bin_low"], numbers["bin_high"]) == ("int4/sawb/nearest", "0", "1")
    assert (numbers["bias"], numbers["mse_closed_form"], numbers["variance"]) == ("0.5", "0.125", "0")
    text = (out / "table1.md").read_text()
    assert "```\nluqrun -m +experiment=table1/measured\n```" in text
    assert text.strip() in (out / "tables.md").read_text()


def test_the_index_shows_each_table_with_its_figure_findings_and_files(out):
    text = (out / "tables.md").read_text()
    start, fig2, table2, left_out = re.split("^## ", text, flags=re.M)
    assert start.startswith("# ")
    assert fig2.startswith("Fig. 2: parts of LUQ (embedded/fig2)\n")
    assert "| luq | 80.1 ± 0.5 (3); 2 missing | −1.9 ± 0.2 (3) | 75.42 (ResNet-50) | −1.08 |" in fig2
    assert fig2.count("- embedded/fig2: ") == 5
    assert "(embedded-fig2.svg)" in fig2
    assert "Table 2" in table2
    assert "- embedded/table2, resnet8: " in table2
    assert "- embedded/fig2: " not in table2
    assert ".svg" not in table2
    assert "summary.json holds NaN" in left_out
    links = re.findall(r"\]\(([^)]*)\)", text)
    assert set(links) >= {"embedded.html", "embedded-fig2.csv", "embedded-fig2-cells.csv", "embedded-fig2.json"}
    assert all((out / link).is_file() for link in links)


def test_the_index_has_the_paper_s_order_and_finds_odd_names(tmp_path):
    for study, table in (("a", "table6"), ("b c", "table2"), ("c", "table2")):
        write_run(tmp_path, table, "resnet8", "luq", study=study)
    report(tmp_path)
    text = (tmp_path / "tables" / "tables.md").read_text()
    assert re.findall(r"^## (Table .)", text, re.M) == ["Table 2", "Table 2", "Table 6"]
    assert "(b%20c.json)" in text
    assert ".html" not in text  # without --html
