"""The errors of activations: each is that of its own way to scale, and a tensor is told once."""

import pytest
import torch
from layers import HINDSIGHT, LUQ, NOTHING, quantize
from torch import nn

from luqrun.bench.activation_errors import activation_errors, markdown


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.out(self.left(x) * self.right(x))


def found(x, recipe=LUQ):
    torch.manual_seed(0)
    model = quantize(Two(), recipe)
    return activation_errors(model, lambda: model(x))


def test_a_tensor_that_two_layers_read_is_told_once():
    first, second = found(torch.randn(50, 8))
    assert (first.layers, second.layers) == (("left", "right"), ("out",))


def test_of_values_that_fit_the_codes_there_is_no_error():
    x = torch.randint(-7, 8, (100, 8)).float()
    x[0, :] = 7
    first, _ = found(x)
    assert first.best_clip == first.a_scale_a_feature == 0


def test_a_feature_of_large_values_costs_the_others_unless_it_has_a_scale_of_its_own():
    torch.manual_seed(1)
    x = torch.randn(500, 8)
    plain, _ = found(x)
    outlier, _ = found(x * torch.tensor([40.0, *[1.0] * 7]))
    assert outlier.peak > 2 * plain.peak
    assert outlier.best_clip > 0.6 * plain.best_clip
    assert outlier.a_scale_a_feature == pytest.approx(plain.a_scale_a_feature, rel=0.3)
    for each in (plain, outlier):
        assert each.int8 < each.best_clip <= each.recipe + 1e-6


def test_what_is_not_quantized_is_left_out_and_hooks_are_removed():
    assert found(torch.randn(5, 8), NOTHING) == []
    model = quantize(Two(), HINDSIGHT)
    activation_errors(model, lambda: model(torch.randn(5, 8)))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_images_have_a_scale_a_channel():
    model = quantize(nn.Sequential(nn.Conv2d(2, 2, 1)), LUQ)
    x = torch.rand(2, 2, 4, 4) * torch.tensor([1.0, 100.0]).view(2, 1, 1)
    (first,) = activation_errors(model, lambda: model(x))
    assert first.a_scale_a_feature < 0.1


def test_the_table_has_a_row_a_tensor():
    lines = markdown(found(torch.randn(50, 8))).splitlines()
    assert len(lines) == 4
    assert lines[2].startswith("| left and 1 more |")
