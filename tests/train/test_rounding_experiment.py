"""job=rounding: what is measured agrees with the closed forms, and what is biased is seen.

The z-tests of bias and variance, over all values, bins and quantizers of this file, are one family: 10^-4 is the
chance that any of them fails when all is well (Bonferroni). The seeds are fixed, so that a failure repeats.
"""

import dataclasses
import json

import pytest
import torch
from running import composed, quiet_machine

from luqrun.cli.results import closing_table
from luqrun.cli.validation import to_config, validate
from luqrun.config import FinetuneConfig, ModelConfig
from luqrun.errors import UserError
from luqrun.quant.kernels.philox import make_stream
from luqrun.quant.quantizer import Quantizer
from luqrun.recipes import recipe
from luqrun.runs.folder import RunFolder
from luqrun.runs.identity import run_id
from luqrun.train import rounding_experiment

QUANTIZERS = {
    "int4, nearest": Quantizer("int4"),
    "int4, stochastic": Quantizer("int4", rounding="stochastic"),
    "int8, stochastic": Quantizer("int8", rounding="stochastic"),
    "one bin": Quantizer("e1m0", rounding="stochastic"),
    "FP4": recipe("biased_log").gradient,
    "FP4 + SR": recipe("fp4_sr").gradient,
    "FP4 + SU": recipe("fp4_su").gradient,
    "nearest throughout": recipe("backward_nearest").gradient,
    "LUQ": recipe("luq").gradient,
    "radix 4": Quantizer("e3m0_radix4", rounding="stochastic"),
}
CASES = [(name, bin) for name, quantizer in QUANTIZERS.items() for bin in rounding_experiment.bins(quantizer)]
FAMILY = 2 * len(CASES) * rounding_experiment.POINTS


@pytest.fixture(autouse=True)
def _quiet(tmp_path, monkeypatch):
    monkeypatch.setattr(rounding_experiment, "DRAWS", 1 << 13)
    with quiet_machine(tmp_path):
        yield


def test_bins_are_the_lowest_a_middle_and_the_highest():
    found = {name: rounding_experiment.bins(quantizer) for name, quantizer in QUANTIZERS.items()}
    assert found["int4, nearest"] == [(0, 1), (3, 4), (6, 7)]
    assert found["LUQ"] == [(0, 1), (4, 8), (32, 64)]
    assert found["radix 4"] == [(0, 1), (16, 64), (1024, 4096)]
    assert found["one bin"] == [(0, 1)]


@pytest.mark.parametrize(("name", "bin"), CASES, ids=lambda value: str(value))
def test_measured_is_the_closed_form(name, bin, z_limit):
    quantizer, (low, high) = QUANTIZERS[name], bin
    row = rounding_experiment.measure(quantizer, low, high, make_stream(11, layer=CASES.index((name, bin))))
    x = torch.tensor(row["x"], dtype=torch.float64)
    assert (row["bin"], row["draws"], len(x)) == ([low, high], 1 << 13, rounding_experiment.POINTS)
    assert (x[0], x[-1]) == (low, high)
    measured, expected = (
        {key: torch.tensor(row[of][key]).double() for key in ("bias", "variance", "mse")}
        for of in ("measured", "closed_form")
    )
    # The closed forms themselves, as the paper has them (Table 1, and Eq. 10 without its stochastic part: pruned).
    down, up = x - low, high - x
    below = quantizer.form.logarithmic and low == 0
    drawn = quantizer.underflow if below else quantizer.rounding
    assert row["drawn"] == drawn
    bias = {"nearest": torch.minimum(down, up), "stochastic": 0 * x, "flush": torch.where(x < high, down, 0.0)}[drawn]
    variance = down * up if drawn == "stochastic" else 0 * x
    for key, values in (("bias", bias), ("variance", variance), ("mse", bias**2 + variance)):
        torch.testing.assert_close(expected[key], values, rtol=0, atol=1e-6 * high**2)
    if drawn != "stochastic":
        assert row["z"] == 0
        for key in measured:
            torch.testing.assert_close(measured[key], expected[key], rtol=0, atol=1e-6 * high**2)
        return
    limit, inside = z_limit(FAMILY), (down > 0) & (up > 0)
    for key in measured:
        assert not measured[key][~inside].any()  # a level is kept
    error = (variance / row["draws"]).sqrt()[inside]
    assert (measured["bias"][inside] / error).max() < limit
    assert row["z"] == pytest.approx((measured["bias"][inside] / error).max().item(), rel=1e-4)
    # The square of the error takes two values: its mean has a variance that is known too, 0 at the middle.
    spread = (variance.sqrt() * (up - down).abs())[inside]
    off = (measured["mse"] - variance)[inside].abs()
    middle = spread < 1e-3 * variance[inside]
    assert middle.sum() == 1
    assert off[middle] < 1e-6 * high**2
    assert (off / spread.clamp(min=1e-30) * row["draws"] ** 0.5)[~middle].max() < limit


@pytest.mark.parametrize("wrong", ["nearest", "shared draws"])
def test_a_quantizer_that_is_not_what_it_says_is_seen(monkeypatch, wrong, z_limit):
    quantizer, encode = Quantizer("int4", rounding="stochastic"), Quantizer.encode

    def broken(self, x, scale, signed, stream):
        if wrong == "nearest":
            return encode(Quantizer("int4"), x, scale, signed, stream)
        codes = encode(self, x.view(rounding_experiment.POINTS, -1)[:, 0], scale, signed, stream)
        return codes.repeat_interleave(rounding_experiment.DRAWS)

    monkeypatch.setattr(Quantizer, "encode", broken)
    row = rounding_experiment.measure(quantizer, 3, 4, make_stream(0))
    assert row["z"] > 10 * z_limit(FAMILY)
    assert max(row["measured"]["variance"]) == 0


def test_a_level_that_moves_is_seen_and_can_be_written(monkeypatch):
    encode = Quantizer.encode
    monkeypatch.setattr(Quantizer, "encode", lambda self, x, *rest: encode(self, x, *rest) + (x == 4))
    row = rounding_experiment.measure(Quantizer("int4", rounding="stochastic"), 3, 4, make_stream(0))
    assert row["z"] > 1e6
    json.dumps(row, allow_nan=False)


# The job


def config(*overrides):
    found = to_config(composed("job=rounding", "device=cpu", *overrides))
    validate(found)
    return found


def run(path, *overrides):
    path.mkdir()
    folder = RunFolder(path)
    return rounding_experiment.run(config(*overrides), folder), folder


def test_a_run_measures_each_operand_and_leaves_a_folder(tmp_path):
    summary, folder = run(tmp_path / "run", "quant=luq")
    rows = summary["rounding"]
    names = [(row["operand"], row["quantizer"], tuple(row["bin"])) for row in rows]
    assert names == [
        *[(each, "int4/sawb/nearest", bin) for each in ("weight", "activation") for bin in ((0, 1), (3, 4), (6, 7))],
        *[("gradient", "e3m0/absmax/stochastic", bin) for bin in ((0, 1), (4, 8), (32, 64))],
    ]
    assert folder.summary() == summary
    record = folder.run()
    assert (record["status"], record["device"]) == ("finished", "cpu")
    assert "numba" in record["kernel_backend"]
    assert not folder.checkpoints.exists()
    text = closing_table(config("quant=luq"), summary, folder.path)
    assert all(word in text for word in ("quant=luq", "e3m0/absmax/stochastic", "[32, 64]"))


def test_bins_and_operands_are_measured_apart_and_a_run_repeats(tmp_path):
    summary, _ = run(tmp_path / "one", "quant=forward_sr")
    deviations = [row["z"] for row in summary["rounding"]]
    assert len(set(deviations)) == len(deviations) == 6
    assert run(tmp_path / "again", "quant=forward_sr")[0] == summary
    other, _ = run(tmp_path / "other", "quant=forward_sr", "seed=1")
    assert not set(deviations) & {row["z"] for row in other["rounding"]}


def test_what_does_not_matter_to_it_is_not_in_its_name():
    luq = config("quant=luq")
    name = run_id(luq, {})
    assert name.startswith("rounding-luq-seed0-")
    same = {"precision": "bf16", "study": "other", "model": ModelConfig("vit_tiny"), "finetune": FinetuneConfig("none")}
    for key, value in same.items():
        assert run_id(dataclasses.replace(luq, **{key: value}), {}) == name
    others = (dataclasses.replace(luq, seed=1), config("quant=forward_sr"), config("quant=luq", "job=train"))
    assert len({name, *(run_id(other, {}) for other in others)}) == 4


@pytest.mark.parametrize(
    ("quant", "key"),
    [
        ("mxfp4", "quant.weight.block=32"),
        ("nvfp4_nvidia", r"quant.weight.block=\(16, 16\)"),
        ("luq_xi", "quant.gradient.rounding=stochastic_log"),
    ],
)
def test_quantizers_without_bins_are_refused(tmp_path, quant, key):
    with pytest.raises(UserError, match=f"job=rounding.*{key} has not; scripts/format_errors.py measures"):
        run(tmp_path / "run", f"quant={quant}")
    assert not (tmp_path / "run" / "summary.json").exists()


def test_a_recipe_without_quantizers_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"job=rounding.*quant=fp32 quantizes nothing"):
        run(tmp_path / "run", "quant=fp32")
    assert not (tmp_path / "run" / "summary.json").exists()
