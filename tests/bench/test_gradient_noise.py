"""The noise of 4-bit gradients: unbiased ones average out, biased ones do not, exact ones have none."""

import pytest
import torch
from layers import ALL_STOCHASTIC, E3M0, LUQ, NOTHING
from torch import nn

import luqrun
from luqrun.bench.gradient_noise import gradient_noise, markdown, with_exact_gradients
from luqrun.quant.recipe import Recipe

X = torch.randn(64, 16, generator=torch.Generator().manual_seed(1))


def noise(recipe, counts=(1, 16)):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 8))
    return gradient_noise(network, recipe, lambda model: model(X).square().sum(), counts)


@pytest.fixture(scope="module")
def of_luq():
    return noise(Recipe.of("luq", LUQ.fprop.weight, LUQ.fprop.activation, E3M0, skip=()), (1, 4, 64))


def test_the_noise_of_an_unbiased_gradient_averages_out(of_luq):
    one, _, many = of_luq
    assert one.distance > 0.1
    assert many.distance == pytest.approx(one.distance / 8, rel=0.3)
    assert many.projection == pytest.approx(1, abs=3 * many.distance)


def test_a_biased_gradient_stays_off():
    one, many = noise(luqrun.recipe("biased_log", skip=()))
    assert many.distance == pytest.approx(one.distance)
    assert one.distance > 0.05


def test_exact_gradients_have_no_noise():
    recipe = with_exact_gradients(Recipe.of("luq", LUQ.fprop.weight, LUQ.fprop.activation, E3M0, skip=()))
    assert [each.distance for each in noise(recipe)] == [0, 0]
    assert recipe.fprop == LUQ.fprop
    assert with_exact_gradients(NOTHING) == NOTHING
    assert with_exact_gradients(ALL_STOCHASTIC).wgrad.activation == ALL_STOCHASTIC.wgrad.activation


def test_the_table_has_a_row_for_each_number_of_draws(of_luq):
    assert [line.split(" | ")[0] for line in markdown(of_luq).splitlines()[2:]] == ["| 1", "| 4", "| 64"]
