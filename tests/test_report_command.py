"""scripts/tables.py: what it writes, prints and exits with; and the pages, parsed and looked at in a browser."""

import csv
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from report_runs import DIVERGED, hide, write_run, write_study
from shell import ROOT, environment

from luqrun.report.command import main

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
ORDERED = {
    "fp32": [82.0, 82.6, 81.4],
    "biased_log": [70.1, 71.0, 69.5],
    "fp4_sr": [75.0, 75.9, 74.5],
    "fp4_su": [77.0, 77.8, 76.6],
    "uniform_sr": [DIVERGED] * 3,
    "luq": [80.1, 80.5, 79.6],
}

# A recipe that diverges shows something from five seeds on.
OF_FIVE_SEEDS = {row: [*values, *values[:2]] for row, values in ORDERED.items()}


def report(outputs, *arguments) -> int:
    return main([str(outputs), *map(str, arguments)])


def refused(capsys, *arguments) -> str:
    """The single line with which the command ends."""
    with pytest.raises(SystemExit) as ended:
        main([str(each) for each in arguments])
    text = capsys.readouterr()
    assert ended.value.code == 1
    assert text.err.startswith("tables.py: ")
    assert text.err.count("\n") == 1
    return text.err.removeprefix("tables.py: ").strip()


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
    assert wrong.stderr.startswith("tables.py: table fig3 is not known; allowed: ")


def test_help_is_printed(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    assert "95%" in capsys.readouterr().out


def test_empty_outputs_say_how_to_begin(tmp_path, capsys):
    assert report(tmp_path) == 0
    assert "no runs of tables under" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "tables").iterdir()) == ["findings.md"]
    assert report(tmp_path, "--check") == 1  # what is not there does not hold


def test_a_table_of_numbers_needs_no_extra(tmp_path, capsys, monkeypatch):
    hide(monkeypatch, "matplotlib", "scipy")
    write_run(tmp_path, "table2", "resnet8", "fp32", 0, 80.0)
    write_run(tmp_path, "table2", "resnet8", "luq", 0, 79.25)
    write_run(tmp_path, "table2", "resnet8", "luq", 1, status="running", name="going")
    assert report(tmp_path, "--html") == 0
    printed, out = capsys.readouterr().out, tmp_path / "tables"
    names = ["findings.md", "glyphs-table2.csv", "glyphs-table2.json", "glyphs-table2.md", "glyphs.html"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert "| resnet8, luq | 79.2 (1); 2 missing | −0.8 (1) | 69.09 (ResNet-18) | −0.61 |" in printed
    assert "luqrun -m +experiment=table2/glyphs model=resnet8 seed=1,2 quant=luq\n" in printed
    assert (out / "glyphs-table2.md").read_text() in printed
    assert (out / "findings.md").read_text() in printed
    assert "glyphs/table2/going: incomplete: running" in (out / "findings.md").read_text()


def test_figures_without_matplotlib_name_the_extra(tmp_path, capsys, monkeypatch):
    hide(monkeypatch, "matplotlib")
    write_run(tmp_path)
    assert refused(capsys, tmp_path) == "figures need matplotlib: pip install 'luqrun[plot]'"


def test_summaries_hold_what_stays_when_the_folders_are_gone(tmp_path):
    write_run(tmp_path, "table2", "resnet8", "luq", 1, 79.25, name="one")
    write_run(tmp_path, "table2", "resnet8", "luq", 0, DIVERGED, name="two")
    report(tmp_path)
    diverged, finished = json.loads((tmp_path / "tables" / "glyphs-table2.json").read_text())
    assert (finished["run"], finished["status"], finished["top1"], finished["seed"]) == ("one", "finished", 79.25, 1)
    assert finished["curve"] == [4.0, 30.5, 79.25]
    assert (finished["git_commit"], finished["git_dirty"], finished["versions"]["torch"]) == ("c0ffee", False, "2.15.0")
    assert (diverged["status"], diverged["top1"], diverged["diverged_at_step"]) == ("diverged", None, 123)
    assert str(tmp_path) not in (tmp_path / "tables" / "glyphs-table2.json").read_text()


def test_two_tables_of_one_study_do_not_overwrite_each_other(tmp_path):
    write_run(tmp_path, "table2", "resnet8", "luq", study="mine", name="one")
    write_run(tmp_path, "table6", "resnet8", "luq", study="mine", name="two")
    write_run(tmp_path, "table6", "resnet8", "luq", study="other", name="three")
    report(tmp_path)
    names = {path.name for path in (tmp_path / "tables").glob("*.md")}
    assert names == {"mine-table2-glyphs.md", "mine-table6-glyphs.md", "other.md", "findings.md"}


def test_only_the_tables_that_were_asked_for(tmp_path, capsys):
    write_run(tmp_path, "table2", "resnet8", "luq")
    write_run(tmp_path, "table6", "resnet8", "luq", study="other/table6")
    assert report(tmp_path, "--table", "table6", "--out", tmp_path / "there", "--html") == 0
    assert "Table 2" not in capsys.readouterr().out
    names = {path.name for path in (tmp_path / "there").iterdir()}
    assert names == {"other-table6.md", "other-table6.csv", "other-table6.json", "findings.md", "other.html"}
    assert not (tmp_path / "tables").exists()


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
    assert b"diverged (1 of 2)" in second["glyphs-table2.md"]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Outputs whose fig2 holds the paper's ordering, with a run that is left out and a name that is no HTML."""
    for package in ("matplotlib", "scipy"):
        pytest.importorskip(package)
    outputs = tmp_path_factory.mktemp("outputs")
    write_study(outputs, "fig2", ORDERED)
    write_run(outputs, "fig2", "luq", seed=3, top1=float("nan"))
    write_run(outputs, "fig2", "<b>", seed=0, top1=1.0, name="bold")
    write_run(outputs, "table2", "resnet8", "luq", 0, 79.25)
    return outputs


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
    assert "5 claims, each tested alone, without a correction for their number" in printed
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
    assert report(study, "--table", "table2", "--check", "--out", tmp_path) == 1  # runs are missing
    luq = [76.0, 77.5, 75.4, 76.0, 77.5]  # FP4 + SU is above it
    write_study(tmp_path, "fig2", {**OF_FIVE_SEEDS, "luq": luq})
    capsys.readouterr()
    assert report(tmp_path, "--check") == 1
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == "--check: 1 of 5 claims are not shown in these runs"
    assert "LUQ is above FP4 + SU: contradicted" in printed
    assert report(tmp_path) == 0  # told, but no failure


def test_the_files_of_a_figure(out):
    names = [f"glyphs-fig2.{ending}" for ending in ("csv", "json", "md", "png", "svg")]
    assert {path.name for path in out.iterdir()} == {
        *names, "findings.md", "glyphs.html", *(f"glyphs-table2.{ending}" for ending in ("csv", "json", "md")),
    }  # fmt: skip
    with (out / "glyphs-fig2.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 31
    assert sum(row["status"] == "finished" for row in rows) == 16
    assert sum(row["status"] == "diverged" for row in rows) == 3
    assert {row["top1"] for row in rows if row["status"] == "missing"} == {""}
    assert json.loads((out / "glyphs-fig2.json").read_text())[0]["status"] == "finished"


class Page(HTMLParser):
    """What a page holds: attributes that load or link, ids, and the cells of its tables."""

    def __init__(self, text):
        super().__init__()
        self.links, self.ids, self.tags, self.rows, self.in_cell = [], [], [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.ids += [value for name, value in attributes if name == "id"]
        self.links += [value for name, value in attributes if name in LOADING]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.in_cell = True

    def handle_data(self, data):
        if self.in_cell:
            self.rows[-1][-1] += data

    def handle_endtag(self, tag):
        self.in_cell = self.in_cell and tag not in ("td", "th")


LOADING = ("src", "href", "xlink:href", "data", "action", "poster", "srcset", "background")


def test_a_page_loads_nothing(out):
    text = (out / "glyphs.html").read_text()
    page = Page(text)
    assert not re.search(r"https?:|@import|//[a-z]", text)
    assert not {"script", "link", "img", "iframe", "object", "base"} & set(page.tags)
    assert all(link.startswith("#") for link in page.links)
    assert set(re.findall(r"url\((.)", text)) <= {"#"}
    assert "svg" in page.tags


def test_every_number_of_a_page_links_to_its_runs(out):
    page = Page((out / "glyphs.html").read_text())
    runs = [each for each in page.ids if "seed" in each or each.endswith("-bold")]
    assert len(set(runs)) == len(runs) == 20
    assert {link[1:] for link in page.links} <= set(page.ids)
    rows = {row[0]: row for row in page.rows}
    assert rows["luq"][1:4] == ["80.1 ± 0.5 (3); 2 missing", "−1.9 ± 0.2 (3)", "75.42 (ResNet-50)"]
    assert rows["luq"][-1] == "0 1 2"
    assert rows["uniform_sr"][1] == "diverged (3 of 3); 2 missing"
    assert rows["resnet8, luq"][-1] == "0"
    assert rows["resnet8, fp32"][1:] == ["missing", "", "69.7 (ResNet-18)", "", ""]
    for row in page.rows:
        if re.match(r"[\d.]+ |diverged", row[1]) and row[0]:
            assert re.fullmatch(r"\d( \d)*", row[-1]), row
    seeds = [link for link in page.links if "seed" in link or link.endswith("-bold")]
    assert sorted(link[1:] for link in seeds) == sorted(runs)


def test_a_page_tells_of_each_run_what_made_it(out):
    text = (out / "glyphs.html").read_text()
    assert "<pre>luqrun seed=1 quant=luq +experiment=fig2/glyphs\n\ncommit c0ffee, numba 0.68.1" in text
    assert "  table: fig2\n  scale: glyphs\n  row: luq\n" in text
    assert "<summary>12 missing runs</summary>" in text
    assert "summary.json holds NaN" in text
    assert '<li class="holds">glyphs/fig2: LUQ is above FP4 + SR: holds (+' in text
    assert "<b>" not in text
    assert "<td>&lt;b&gt;</td>" in text


def test_measured_tables_are_on_a_page_with_their_runs(tmp_path, capsys):
    row = {
        "operand": "weight", "quantizer": "int4/sawb/nearest", "bin": [0, 1], "draws": 8, "drawn": "nearest",
        "x": [0.0, 0.5], "z": 0.0,
        "measured": {"bias": [0, 0.5], "variance": [0, 0], "mse": [0, 0.25]},
        "closed_form": {"bias": [0, 0.5], "variance": [0, 0], "mse": [0, 0.25]},
    }  # fmt: skip
    path = write_run(tmp_path, "table1", "forward_only", "rounding", scale="measured")
    (path / "summary.json").write_text(json.dumps({"rounding": [row]}))
    assert report(tmp_path, "--html") == 0
    assert "| RDN | int4 | [0, 1] | 0.5 (0.5) | 0 (0) | 0.125 (0.125) | 0.00 |" in capsys.readouterr().out
    assert {each.name for each in (tmp_path / "tables").iterdir()} == {
        "table1.md", "fig1a.md", "measured.html", "findings.md",
    }  # fmt: skip
    page = Page((tmp_path / "tables" / "measured.html").read_text())
    assert ["RDN", "int4", "[0, 1]", "0.5 (0.5)", "0 (0)", "0.125 (0.125)", "0.00"] in page.rows
    assert len(page.links) == 1
    assert page.links[0][1:] in page.ids


LOOK = """<pre id="seen"></pre><script>
const links = [...document.querySelectorAll("a")];
const visible = element => element.getBoundingClientRect().width > 20 && element.getBoundingClientRect().height > 10;
document.getElementById("seen").textContent = JSON.stringify({
  links: links.length,
  dead: links.filter(link => !document.querySelector("details" + link.getAttribute("href"))).length,
  figures: [...document.querySelectorAll("svg")].map(svg => ({
    visible: visible(svg), curves: svg.querySelectorAll("path").length, within: svg.clientWidth <= innerWidth,
    shapes: [...svg.querySelectorAll("use")].every(use => document.querySelector(use.getAttribute("xlink:href"))),
  })),
  tables: [...document.querySelectorAll("table")].filter(visible).map(table => table.rows.length),
  missing: [...document.querySelectorAll("td.missing")].map(cell => getComputedStyle(cell).color),
  loaded: performance.getEntriesByType("resource").length,
  heading: document.querySelector("h1").innerText,
});</script>"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_a_browser_shows_the_page(out, tmp_path):
    text = (out / "glyphs.html").read_text()
    (tmp_path / "page.html").write_text(text.replace("</body>", LOOK + "</body>"))
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
        "--window-size=1000,1400", "--dump-dom", (tmp_path / "page.html").as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    seen = json.loads(re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.S)[1])
    assert (seen["links"], seen["dead"], seen["loaded"], seen["heading"]) == (20, 0, 0, "glyphs")
    (figure,) = seen["figures"]
    assert figure["visible"]
    assert figure["within"]
    assert figure["shapes"]
    assert figure["curves"] > 20
    assert seen["tables"] == [8, 17]
    assert len(seen["missing"]) == 6 + 16
    assert set(seen["missing"]) == {"rgb(187, 0, 0)"}
    assert "80.1 ± 0.5 (3); 2 missing" in done.stdout
