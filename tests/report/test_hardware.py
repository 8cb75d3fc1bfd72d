"""The page on hardware, from runs and facts that are made up or counted here."""

import json

import pytest
from running import composed

from luqrun.cli.validation import to_config
from luqrun.cost import job
from luqrun.errors import UserError
from luqrun.report import hardware
from luqrun.runs.folder import RunFolder

COUNT = {
    **{"model": "resnext8", "forward": 10, "backward": 15, "as_torch": 20},
    **{"torch_forward": 10, "torch_backward": 20},
}
PRODUCTS = {"products": 256, "exact": True, "magnitudes": 31, "do_not_fit": 0}
MULTIPLIER = {
    "signed": PRODUCTS,
    "unsigned": {"products": 240, "exact": True, "magnitudes": 63, "do_not_fit": 28},
    "gemms": 8,
    "gemms_equal": True,
    "trained": [{"command": "luqrun quant=luq", "identical": True, "numbers": 7, "steps": 4, "seconds": [9.0, 1.0]}],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    outputs = tmp_path_factory.mktemp("outputs")
    for quant in ("fp32", "luq"):
        path = outputs / quant
        path.mkdir()
        job.run(
            to_config(composed("job=cost", "model=resnext8", "dataset.batch_size=2", f"quant={quant}")), RunFolder(path)
        )
    return outputs


def page(folder, count=COUNT, multiplier=MULTIPLIER):
    return hardware.page(hardware.read(folder), [count], multiplier, ["luqrun -m ...", "python ..."])


def test_the_page_has_every_run_and_where_the_rest_went(folder):
    text = page(folder)
    assert text.startswith("# Hardware")
    summary = json.loads((folder / "luq" / "summary.json").read_text())
    row = next(line for line in text.splitlines() if line.startswith("| resnext8 | luq |"))
    assert f"{100 * summary['cost/share_of_macs_4bit']:.1f} %" in row
    assert f"{summary['cost/fprop_macs_per_example']:,}" in row
    assert "| resnext8 | fp32 |" in text
    assert "| network | recipe | first |" in text or "| shortcut |" in text
    assert "- resnext8: 3 grouped convolutions have" in text


def test_facts_are_told_as_they_are(folder):
    text = page(folder)
    assert "all 256 pairs of 4-bit fields give the integer product: yes" in text
    assert "28 of the 63 magnitudes need a third fraction bit" in text
    assert "bit-identical: yes (4 steps, 9 s against 1 s" in text
    assert "| resnext8 | 10 | 10 | 15 | 20 | 20 | yes |" in text
    wrong = {**MULTIPLIER, "signed": {**PRODUCTS, "exact": False}}
    text = page(folder, {**COUNT, "torch_backward": 21}, wrong)
    assert "give the integer product: **no**" in text
    assert "| 20 | 21 | **no** |" in text


def test_gates_stand_there_with_their_cells_and_the_papers_claim(folder):
    text = page(folder)
    assert "| full adder | 5 | 9 |" in text
    assert "| mantissa multiplier | 9 and, 3 half adder, 3 full adder | 30 |" in text
    assert "The paper says about 5 times" in text
    assert "264" not in text.partition("## Gates")[2]  # what is recalled of the paper's own table is not printed


def test_what_is_no_run_of_the_job_is_refused(folder, tmp_path):
    with pytest.raises(UserError, match=r"holds no run of job=cost; luqrun -m \+experiment=hardware/paper"):
        hardware.read(tmp_path)
    (tmp_path / "cost.json").write_text("{")
    with pytest.raises(UserError, match="is not what job=cost writes"):
        hardware.read(tmp_path)
    (tmp_path / "cost.json").write_text("{}")
    with pytest.raises(UserError, match="has no model"):
        hardware.read(tmp_path)
