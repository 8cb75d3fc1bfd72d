"""Summaries as busy hands leave them: the report names what it leaves out, and no one sees a traceback."""

import json
import shutil
import tempfile
from pathlib import Path

import pytest
from fuzzing import examples
from garbling import GARBAGE, VALUES, report, with_value, without_figures, write_pristine
from hypothesis import given
from hypothesis import strategies as st


@pytest.fixture(scope="module")
def undrawn():
    with without_figures():
        yield


@pytest.fixture(scope="module")
def published(undrawn, tmp_path_factory):
    """The summaries of a small study, in a folder."""
    out = tmp_path_factory.mktemp("published")
    assert report(write_pristine(tmp_path_factory.mktemp("pristine")), "--out", str(out))[0] == 0
    return out


@examples(15)
@given(
    done=st.lists(st.tuples(st.integers(0, 10**6), st.booleans(), VALUES), min_size=1, max_size=3),
    garbage=st.one_of(st.none(), GARBAGE),
)
def test_the_report_names_the_summaries_that_it_leaves_out(published, undrawn, done, garbage):
    with tempfile.TemporaryDirectory() as folder:
        outputs = shutil.copytree(published, Path(folder) / "outputs")
        path = outputs / "embedded-fig2.json"
        for number, delete, value in done:
            path.write_text(with_value(path.read_text(), path.name, number, delete, value))
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
