"""What the page on hardware says of the multiplier, and of torch's counter."""

import pytest
from running import composed

from luqrun.bench import mfbprop, torch_counts
from luqrun.bench.torch_counts import counts_of
from luqrun.cli.validation import to_config
from luqrun.cost import job
from luqrun.quant import kernels
from luqrun.runs.folder import RunFolder, write_atomically


def test_all_products_are_exact_and_some_do_not_fit():
    assert mfbprop.products(True) == {"products": 256, "exact": True, "magnitudes": 32, "do_not_fit": 0}
    assert mfbprop.products(False) == {"products": 240, "exact": True, "magnitudes": 63, "do_not_fit": 28}


def test_gemms_are_compared(monkeypatch):
    assert mfbprop.equal_gemms() == [True] * 2 * len(mfbprop.SHAPES)
    values = kernels.mfbprop.values
    monkeypatch.setattr(kernels.mfbprop, "values", lambda signed: values(signed) * 2)
    assert not any(mfbprop.equal_gemms())
    assert not mfbprop.products(True)["exact"]


@pytest.fixture
def runs(tmp_path):
    from omegaconf import OmegaConf

    for name, overrides in (("a", ["model=resnext8"]), ("b", ["model=resnext8", "quant=fp32"]), ("c", [])):
        config = to_config(composed("job=cost", "dataset.batch_size=2", *overrides))
        folder = tmp_path / name
        folder.mkdir()
        write_atomically(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.structured(config)).encode())
        job.run(config, RunFolder(folder))
    return tmp_path


def test_a_network_is_counted_once_and_as_torch_counts(runs):
    rows = counts_of(runs)
    assert [row["model"] for row in rows] == ["resnext8", "resnet8"]
    for row in rows:
        assert (row["forward"], row["as_torch"]) == (row["torch_forward"], row["torch_backward"])
    assert rows[0]["backward"] < rows[0]["as_torch"]
    assert rows[1]["backward"] == rows[1]["as_torch"]
    assert torch_counts.counts_of(runs / "nothing") == []
