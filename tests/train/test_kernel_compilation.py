"""What is compiled before a run's first step: all that its steps need, and nothing else."""

import logging
import threading

import pytest
import torch
from layers import ALL_STOCHASTIC, E3M0, HINDSIGHT, INT4, LUQ, NOTHING, quantize
from running import quiet_machine, train
from torch import nn

import luqrun
from luqrun.config import Config
from luqrun.quant.convert import set_finetune, set_step
from luqrun.quant.finetune import PHASES
from luqrun.quant.kernels import backend_for, reference, stand_in
from luqrun.quant.kernels.cpu import ahead, driver, int8_tiles
from luqrun.quant.kernels.stand_in import StandIn
from luqrun.quant.recipe import Recipe
from luqrun.train import kernel_compilation
from luqrun.train.trainer import Trainer

CPU = torch.device("cpu")
RECIPES = {
    "luq": LUQ,
    "stochastic": ALL_STOCHASTIC,
    "hindsight": HINDSIGHT,
    "radix 4": luqrun.recipe("radix4_tpr", skip=()),
    "forward only": Recipe.of("forward only", INT4, INT4),
    "backward only": Recipe.of("backward only", gradient=E3M0),
}


@pytest.fixture
def prepared(monkeypatch):
    """What was last looked for in the cache, as names; nothing is missing."""
    asked = []
    monkeypatch.setattr(ahead, "missing", lambda versions: asked.append(names(versions)) or [])
    return lambda: asked[-1] if asked else set()


def training_kernels(model, recipe, **changes):
    config = Config()
    config.compile = changes.get("compile", False)
    check = changes.get("check", lambda: None)
    return kernel_compilation.training_kernels(config, model, recipe, CPU, True, check)


def names(versions) -> set[str]:
    return {version.driver.__name__ for version in versions}


def convolutions(recipe):
    layers = (
        nn.Conv2d(3, 8, 3, stride=2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 4, 1),
        nn.Flatten(),
        nn.Linear(16, 2),
    )
    model = quantize(nn.Sequential(*layers), recipe).to(memory_format=torch.channels_last)
    x = torch.ones(2, 3, 5, 5).to(memory_format=torch.channels_last)
    return model, x.requires_grad_()  # as of a layer before it: a stride has a dgrad of its own


def linear(recipe):
    return quantize(nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 2)), recipe), torch.ones(3, 4)


@pytest.mark.parametrize("network", [convolutions, linear])
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_it_is_what_steps_and_evaluations_take(recipe, network, prepared):
    model, x = network(recipe)
    training_kernels(model, recipe)
    with driver.rehearsal() as versions:
        for phase in (False, *PHASES):
            set_finetune(model.train(), phase)
            model(x).sum().backward()
            with torch.no_grad():
                model.eval()(x)
    assert prepared() == names(versions)


def test_nothing_is_prepared_for_full_precision(prepared):
    model, _ = convolutions(NOTHING)
    training_kernels(model, NOTHING)
    assert prepared() == set()


def test_nothing_is_prepared_for_the_reference(prepared, monkeypatch):
    model, _ = linear(LUQ)
    monkeypatch.setattr(kernel_compilation, "backend_for", lambda device: reference)
    training_kernels(model, LUQ)
    assert prepared() == set()


def test_preparing_draws_nothing_that_training_would_miss(prepared):
    model, _ = linear(LUQ)
    before = torch.get_rng_state()
    training_kernels(model, LUQ)
    assert torch.equal(before, torch.get_rng_state())


def test_a_run_prepares_before_its_first_step(tmp_path, monkeypatch):
    order = []
    monkeypatch.setattr(ahead, "missing", lambda versions: order.append("prepared") or [])
    train_step = Trainer.train_step
    monkeypatch.setattr(Trainer, "train_step", lambda self, *a: order.append("step") or train_step(self, *a))
    with quiet_machine(tmp_path / "cache"):
        train(tmp_path / "run")
    assert order[0] == "prepared"
    assert order.count("prepared") == 1


def test_a_compiled_step_waits_for_its_kernels(prepared, monkeypatch):
    asked = []
    monkeypatch.setattr(ahead, "compile_all", lambda versions, progress, first: asked.append(names(versions)))
    model, _ = linear(LUQ)
    assert not training_kernels(model, LUQ, compile=True).goes_on
    assert len(asked) == 1
    assert "quantize" in asked[0]


# Training while kernels are compiled


class Compiler:
    """In place of what ahead.begin gives: done when told."""

    def __init__(self, monkeypatch, cores=64):
        self.done, self.ended = False, False
        monkeypatch.setattr(ahead, "begin", lambda versions: self)
        monkeypatch.setattr(ahead, "missing", list)
        monkeypatch.setattr(ahead, "compile_all", lambda versions, progress, first: None)
        monkeypatch.setattr(ahead, "cores", lambda: cores)

    def is_done(self):
        return self.done

    def end(self):
        self.ended = True

    def finish(self):
        self.done = True


@pytest.fixture
def compiler(monkeypatch):
    return Compiler(monkeypatch)


def network():
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(36, 2)
    torch.manual_seed(3)
    return quantize(nn.Sequential(*layers), HINDSIGHT), torch.randn(2, 3, 5, 5)


def gradients(model, x, number=0):
    set_step(model, number)
    model.zero_grad()
    model(x).sum().backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def trained(steps, between=lambda number: None, run=None):
    """The gradients of some steps, and the buffers after them."""
    model, x = network()
    found = []
    for number in range(steps):
        found += gradients(model, x, number) if run is None else run(model, gradients, model, x, number)
        between(number)
    return found, list(model.buffers())


def test_steps_have_the_same_bits_before_and_after_the_kernels_are_there(compiler):
    kernels = backend_for("cpu")
    with training_kernels(network()[0], HINDSIGHT) as compilation:
        assert isinstance(backend_for("cpu"), StandIn)
        found = trained(4, lambda number: number == 1 and compiler.finish(), compilation.run)
        assert not compilation.goes_on
        assert backend_for("cpu") is kernels
    expected = trained(4)
    assert all(map(torch.equal, found[0], expected[0]))
    assert all(map(torch.equal, found[1], expected[1]))


@pytest.mark.parametrize("before", [1, 7, 13])
def test_a_step_in_which_they_come_to_be_there_is_repeated(before, compiler):
    calls, begun = [], []

    def step(*arguments):
        begun.append(isinstance(backend_for("cpu"), StandIn))
        return gradients(*arguments)

    with training_kernels(network()[0], HINDSIGHT) as compilation:

        def count(*arguments):
            calls.append(arguments)
            if len(calls) == before:
                compiler.finish()
            return statistics(*arguments)

        statistics = reference.statistics
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reference, "statistics", count)
            found = trained(3, run=lambda model, function, *rest: compilation.run(model, step, *rest))
    assert begun.count(False) + begun.count(True) == 4  # one of them twice
    expected = trained(3)
    assert all(map(torch.equal, found[0], expected[0]))
    assert all(map(torch.equal, found[1], expected[1]))  # batch norm has seen three steps


def test_a_large_tensor_waits_for_the_kernels(compiler, monkeypatch):
    monkeypatch.setattr(stand_in, "LARGE", 10)
    model, x = network()
    with training_kernels(model, HINDSIGHT) as compilation:
        threading.Timer(0.1, compiler.finish).start()
        compilation.run(model, gradients, model, x)
        assert not compilation.goes_on


def test_without_a_core_for_it_one_step_alone_goes_without_kernels(monkeypatch):
    compiler = Compiler(monkeypatch, cores=2)
    model, x = network()
    with training_kernels(model, HINDSIGHT) as compilation:
        compilation.run(model, gradients, model, x)
        assert compilation.goes_on
        threading.Timer(0.1, compiler.finish).start()
        compilation.run(model, gradients, model, x)
        assert not compilation.goes_on


def test_who_leaves_ends_the_compiling(compiler):
    kernels = backend_for("cpu")
    with pytest.raises(KeyboardInterrupt), training_kernels(network()[0], HINDSIGHT):
        raise KeyboardInterrupt
    assert compiler.ended
    assert backend_for("cpu") is kernels


def test_who_waits_looks_whether_it_is_to_stop(monkeypatch):
    Compiler(monkeypatch, cores=2)
    model, x = network()

    def stop():
        raise KeyboardInterrupt

    with training_kernels(model, HINDSIGHT, check=stop) as compilation:
        compilation.run(model, gradients, model, x)
        with pytest.raises(KeyboardInterrupt):
            compilation.run(model, gradients, model, x)


def test_where_another_process_compiles_a_run_waits(compiler, monkeypatch):
    asked = []
    monkeypatch.setattr(ahead, "begin", lambda versions: None)
    monkeypatch.setattr(ahead, "compile_all", lambda versions, progress, first: asked.append(versions))
    with training_kernels(network()[0], HINDSIGHT) as compilation:
        assert asked
        assert not compilation.goes_on


def test_the_progress_is_told_where_there_is_no_terminal(caplog, monkeypatch):
    seconds = [0]
    monkeypatch.setattr(kernel_compilation.time, "monotonic", lambda: seconds[0])
    with caplog.at_level(logging.INFO), kernel_compilation._Report(None) as report:
        for done in range(5):
            report(done, 4)
            seconds[0] += 3
    first, *between, last = [record.getMessage() for record in caplog.records]
    assert "compiling the kernels" in first
    assert between == ["compiling: 2 of 4 functions", "compiling: 4 of 4 functions"]
    assert "no part of the time of training" in last


def test_nothing_is_told_where_nothing_is_compiled(caplog):
    with caplog.at_level(logging.INFO), kernel_compilation._Report(None):
        pass
    assert not caplog.records


@pytest.mark.parametrize(
    ("size", "batch", "channels", "taken"), [(32, 128, 128, True), (20, 128, 64, False), (32, 128, 24, False)]
)
def test_loops_for_large_convolutions_are_compiled_where_there_may_be_some(size, batch, channels, taken, prepared):
    if not int8_tiles.is_there():
        pytest.skip("needs AVX-512 VNNI")
    config = Config()
    config.dataset.image_size, config.dataset.batch_size = size, batch
    model = quantize(nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1)), LUQ)
    kernel_compilation.training_kernels(config, model, LUQ, CPU, True, lambda: None)
    assert ({"convolve_points", "multiply_points"} <= prepared()) == taken
    assert "convolve" in prepared()
