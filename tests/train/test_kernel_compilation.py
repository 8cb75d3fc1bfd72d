"""What is compiled before a run's first step: all that its steps need, and nothing else."""

import logging

import pytest
import torch
from layers import ALL_STOCHASTIC, E3M0, HINDSIGHT, INT4, LUQ, NOTHING, quantize
from running import quiet_machine, train
from torch import nn

import luqrun
from luqrun.quant.convert import set_finetune
from luqrun.quant.finetune import PHASES
from luqrun.quant.kernels import reference
from luqrun.quant.kernels.cpu import ahead, driver
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
    """What compile_all was last asked for, as names; it does nothing."""
    asked = []
    monkeypatch.setattr(ahead, "compile_all", lambda versions, progress, first: asked.append(names(versions)))
    return lambda: asked[-1] if asked else set()


def names(versions) -> set[str]:
    return {version.driver.__name__ for version in versions}


def convolutions(recipe):
    layers = [nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(16, 2)]
    model = quantize(nn.Sequential(*layers), recipe).to(memory_format=torch.channels_last)
    return model, torch.ones(2, 3, 5, 5, requires_grad=True)  # as of a layer before it: a stride has a dgrad of its own


def linear(recipe):
    return quantize(nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 2)), recipe), torch.ones(3, 4)


@pytest.mark.parametrize("network", [convolutions, linear])
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_it_is_what_steps_and_evaluations_take(recipe, network, prepared):
    model, x = network(recipe)
    kernel_compilation.compile_training_kernels(model, recipe, CPU, no_bar=True)
    with driver.rehearsal() as versions:
        for phase in (False, *PHASES):
            set_finetune(model.train(), phase)
            model(x).sum().backward()
            with torch.no_grad():
                model.eval()(x)
    assert prepared() == names(versions)


def test_nothing_is_prepared_for_full_precision(prepared):
    model, _ = convolutions(NOTHING)
    kernel_compilation.compile_training_kernels(model, NOTHING, CPU, no_bar=True)
    assert prepared() == set()


def test_nothing_is_prepared_for_the_reference(prepared, monkeypatch):
    model, _ = linear(LUQ)
    monkeypatch.setattr(kernel_compilation, "backend_for", lambda device: reference)
    kernel_compilation.compile_training_kernels(model, LUQ, CPU, no_bar=True)
    assert prepared() == set()


def test_preparing_draws_nothing_that_training_would_miss(prepared):
    model, _ = linear(LUQ)
    before = torch.get_rng_state()
    kernel_compilation.compile_training_kernels(model, LUQ, CPU, no_bar=True)
    assert torch.equal(before, torch.get_rng_state())


def test_a_run_prepares_before_its_first_step(tmp_path, monkeypatch):
    order = []
    monkeypatch.setattr(ahead, "compile_all", lambda versions, progress, first: order.append("prepared"))
    train_step = Trainer.train_step
    monkeypatch.setattr(Trainer, "train_step", lambda self, *a: order.append("step") or train_step(self, *a))
    with quiet_machine(tmp_path / "cache"):
        train(tmp_path / "run")
    assert order[0] == "prepared"
    assert order.count("prepared") == 1


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
