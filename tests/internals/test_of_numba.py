"""numba's interfaces that it does not promise: these tests say what broke when numba changes."""

import numba
import pytest
from numba import njit

from luqrun.internals import of_numba


def test_the_launched_layer_is_told(monkeypatch):
    monkeypatch.setattr(numba, "threading_layer", lambda: "workqueue")
    assert of_numba.threading_layer() == "workqueue"


@pytest.mark.parametrize(
    ("asked", "there", "expected"),
    [
        ("default", ("omp", "workqueue"), "omp"),
        ("default", ("tbb", "omp"), "tbb"),
        ("default", (), None),
        ("omp", (), "omp"),
        ("forksafe", ("tbb", "omp"), None),
    ],
)
def test_the_layer_to_come_is_numbas_own_choice(monkeypatch, asked, there, expected):
    def none_yet():
        raise ValueError("Threading layer is not initialized.")

    monkeypatch.setattr(numba, "threading_layer", none_yet)
    monkeypatch.setattr(numba.config, "THREADING_LAYER", asked)
    monkeypatch.setattr(numba.config, "THREADING_LAYER_PRIORITY", ["tbb", "omp", "workqueue"])
    monkeypatch.setattr(of_numba, "is_there", lambda layer: layer in there)
    assert of_numba.threading_layer() == expected


def test_numbas_pools_are_where_they_are_looked_for():
    assert of_numba.is_there("workqueue")
    assert isinstance(of_numba.is_there("omp"), bool)
    assert isinstance(of_numba.is_there("tbb"), bool)


def test_a_compilation_is_announced_with_its_dispatcher():
    told = []

    class Listener(of_numba.event.Listener):
        def on_start(self, started):
            told.append(started.data["dispatcher"])

        def on_end(self, ended):
            told.append(ended.data["dispatcher"])

    function = njit(lambda number: number + 1)
    with of_numba.event.install_listener("numba:compile", Listener()):
        function(1)
        function(2)  # compiled already
    assert told == [function, function]
    assert isinstance(function, of_numba.Dispatcher)


def test_the_first_function_fixes_the_features(monkeypatch):
    njit(lambda x: x)
    name, features = of_numba.compiled_for()
    monkeypatch.setattr(numba.config, "CPU_FEATURES", "+avx2")
    assert of_numba.compiled_for() == (name, features)
