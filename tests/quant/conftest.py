"""The backends of the kernels, each in its turn; and how often layers make their passes in one call."""

import pytest
import torch
from int8_inputs import prepared_anew

from luqrun.quant import kernels, routes

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


@pytest.fixture
def counted(monkeypatch):
    """[forward, backward] passes in one call."""
    from luqrun.quant.kernels.cpu import passes  # which loads numba

    found = [0, 0]
    for place, name in enumerate(("forward", "backward")):
        real = getattr(passes.LayerPass, name)

        def call(self, *arguments, real=real, place=place):
            found[place] += 1
            return real(self, *arguments)

        monkeypatch.setattr(passes.LayerPass, name, call)
    return found


@pytest.fixture
def blocks_win(monkeypatch):
    """Of several ways, blocks of ours and integers are the fastest; each call tries them anew where nobody has."""

    def take(key, ways):
        name = "int8" if "int8" in ways else next(iter(ways))
        routes._chosen.setdefault((key, *ways, torch.get_num_threads()), [name])
        return ways[name]()

    monkeypatch.setattr(routes, "_chosen", {})
    monkeypatch.setattr("luqrun.quant.kernels.cpu.int8.fastest", take)
    monkeypatch.setattr("luqrun.quant.function.fastest", take)
