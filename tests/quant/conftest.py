"""The backends of the kernels, each in its turn."""

import pytest
from int8_inputs import prepared_anew

from luqrun.quant import kernels

BACKENDS = ("reference", "cpu")


@pytest.fixture(autouse=True)
def _prepared_anew():
    prepared_anew()
    yield
    prepared_anew()


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    """The name of the backend that quantizes in this test, whatever was chosen before."""
    monkeypatch.setenv("LUQRUN_KERNELS", request.param)
    monkeypatch.setattr(kernels, "_fuses", {})
    kernels._serving.clear()
    yield request.param
    kernels._serving.clear()
