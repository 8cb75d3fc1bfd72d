"""The pages of a report: parsed, and looked at in a browser."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from report_runs import write_measured, write_run, write_two_tables

from luqrun.report.command import main

BROWSERS = (
    "chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "chrome-headless-shell",
    "headless_shell",
)  # fmt: skip
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)


def report(outputs, *arguments) -> int:
    return main([str(outputs), *map(str, arguments)])


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A report with a page."""
    for package in ("matplotlib", "scipy"):
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("tables")
    assert report(write_two_tables(tmp_path_factory.mktemp("outputs")), "--html", "--out", folder) == 0
    return folder


def test_a_page_names_what_is_left_out_of_its_own_studies(tmp_path):
    for top in ("one", "two"):
        write_run(tmp_path, "table2", "resnet8", "luq", study=f"{top}/table2")
        write_run(
            tmp_path, "table2", "resnet8", "luq", seed=1, study=f"{top}/table2", status="failed", name=f"bad_{top}"
        )
    report(tmp_path, "--html")
    for own, other in (("one", "two"), ("two", "one")):
        text = (tmp_path / "tables" / f"{own}.html").read_text()
        assert f"{own}/table2/bad_{own}: incomplete" in text
        assert f"bad_{other}" not in text
    assert {"bad_one", "bad_two"} <= set(re.findall(r"bad_\w+", (tmp_path / "tables" / "tables.md").read_text()))


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
    text = (out / "embedded.html").read_text()
    page = Page(text)
    assert not re.search(r"https?:|@import|//[a-z]", text)
    assert not {"script", "link", "img", "iframe", "object", "base"} & set(page.tags)
    assert all(link.startswith("#") for link in page.links)
    assert set(re.findall(r"url\((.)", text)) <= {"#"}
    assert "svg" in page.tags


def test_every_number_of_a_page_links_to_its_runs(out):
    page = Page((out / "embedded.html").read_text())
    runs = [each for each in page.ids if "seed" in each or each.endswith("-bold")]
    assert len(set(runs)) == len(runs) == 20
    assert {link[1:] for link in page.links} <= set(page.ids)
    rows = {row[0]: row for row in page.rows}
    assert rows["luq"][1:4] == ["80.1 ± 0.5 (3); 2 missing", "−1.9 ± 0.2 (3)", "75.42 (ResNet-50)"]
    assert rows["luq"][-1] == "0 1 2"
    assert rows["uniform_sr"][1] == "diverged (3 of 3); 2 missing"
    assert rows["resnet8, luq"][-1] == "0"
    assert rows["resnet8, fp32"][1:] == ["missing", "", "69.7 (ResNet-18)", "", "", ""]
    for row in page.rows:
        if re.match(r"[\d.]+ |diverged", row[1]) and row[0]:
            assert re.fullmatch(r"\d( \d)*", row[-1]), row
    seeds = [link for link in page.links if "seed" in link or link.endswith("-bold")]
    assert sorted(link[1:] for link in seeds) == sorted(runs)


def test_a_page_tells_of_each_run_what_made_it(out):
    text = (out / "embedded.html").read_text()
    assert "<pre>luqrun seed=1 quant=luq +experiment=fig2/embedded\n\ncommit c0ffee, numba 0.68.1" in text
    assert "  table: fig2\n  scale: embedded\n  row: luq\n" in text
    assert "<summary>12 missing runs</summary>" in text
    assert "summary.json holds NaN" in text
    assert '<li class="holds">embedded/fig2: LUQ is above FP4 + SR: holds (+' in text
    assert "<b>" not in text
    assert "<td>&lt;b&gt;</td>" in text


def test_measured_tables_are_on_a_page_with_their_runs(tmp_path, capsys):
    write_measured(tmp_path)
    assert report(tmp_path, "--html") == 0
    assert "| RDN | int4 | [0, 1] | 0.5 (0.5) | 0 (0) | 0.125 (0.125) | 0.00 |" in capsys.readouterr().out
    text = (tmp_path / "tables" / "measured.html").read_text()
    assert "In brackets the closed form; 8 draws a point." in text
    assert "<p>All of it is one command:</p><pre>luqrun -m +experiment=table1/measured</pre>" in text
    assert text.count("one command") == 1  # of Fig. 1a there is none yet
    page = Page(text)
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
    text = (out / "embedded.html").read_text()
    (tmp_path / "page.html").write_text(text.replace("</body>", LOOK + "</body>"))
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
        "--window-size=1000,1400", "--dump-dom", (tmp_path / "page.html").as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    seen = json.loads(re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.S)[1])
    assert (seen["links"], seen["dead"], seen["loaded"], seen["heading"]) == (20, 0, 0, "embedded")
    (figure,) = seen["figures"]
    assert figure["visible"]
    assert figure["within"]
    assert figure["shapes"]
    assert figure["curves"] > 20
    assert seen["tables"] == [8, 25]
    assert len(seen["missing"]) == 6 + 24
    assert set(seen["missing"]) == {"rgb(187, 0, 0)"}
    assert "80.1 ± 0.5 (3); 2 missing" in done.stdout
