"""The backends of the kernels, each in its turn."""

import pytest
from int8_inputs import prepared_anew

from luqrun.quant import kernels
from luqrun.quant.kernels.cpu import passes, sizes

BACKENDS = ("reference", "cpu")


@pytest.fixture(autouse=True)
def _prepared_anew():
    prepared_anew()
    yield
    prepared_anew()


@pytest.fixture
def by_operators(monkeypatch):
    """Layers call their operators one by one, and pack what they keep, as those of large tensors do."""
    monkeypatch.setattr(sizes, "FEW", 0)
    monkeypatch.setattr(passes, "MOST", 0)


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    """The name of the backend that quantizes in this test, whatever was chosen before."""
    monkeypatch.setenv("LUQRUN_KERNELS", request.param)
    monkeypatch.setattr(kernels, "_fuses", {})
    kernels._serving.clear()
    yield request.param
    kernels._serving.clear()
