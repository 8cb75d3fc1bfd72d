"""The matrix products of a forward: by hand, by torch's counter, and as the layers compute them in a real run."""

import pytest
import torch
import torch.nn.functional as F
from running import composed, quiet_machine
from torch import nn

import luqrun
from luqrun.cli.validation import to_config
from luqrun.cost.gemms import gemms_of
from luqrun.cost.products import ATTENTION, LAYER, UNKNOWN, observe
from luqrun.cost.torch_counter import as_torch_counts, counted_by_torch
from luqrun.quant import function
from luqrun.quant.convert import high_precision_layers, quantized_layers
from luqrun.quant.gemms import ConvOp
from luqrun.tasks import outline_task


def on_meta(*layers, shape=(2, 3, 8, 8)):
    with torch.device("meta"):
        return nn.Sequential(*(layer() for layer in layers)), {"input": torch.empty(shape)}


def outline(*overrides):
    return outline_task(to_config(composed("job=cost", "finetune=none", *overrides)))


def test_resnet18_on_imagenet_as_computed_by_hand():
    # (kernel area * inputs, outputs, pixels of the result, how many such layers)
    stages = [(64, 64, 56), (64, 128, 28), (128, 256, 14), (256, 512, 7)]
    convolutions = {"first": 49 * 3 * 64 * 112**2, "last": 512 * 1000}
    blocks = shortcuts = 0
    for number, (before, width, side) in enumerate(stages):
        blocks += 9 * before * width * side**2 + 3 * 9 * width * width * side**2
        shortcuts += before * width * side**2 if number else 0
    by_hand = sum(convolutions.values()) + blocks + shortcuts
    assert by_hand == 1_814_073_344
    found = outline("model=resnet18", "dataset=imagenet", "dataset.batch_size=2")
    products = observe(found.network, found.inputs).products
    assert len(products) == 21
    assert sum(product.macs for product in products) == 2 * by_hand
    first, *others = products
    assert (first.layer, first.macs, first.wants) == ("conv1", 2 * convolutions["first"], (False, True))
    assert all(product.wants == (True, True) for product in others)
    of_shortcuts = sum(product.macs for product in products if "downsample" in product.layer)
    assert of_shortcuts == 2 * shortcuts


NETWORKS = {
    "resnet8": (),
    "resnext8": (),
    "mobilenet_tiny": (),
    "vit_tiny": (),
    "transformer_tiny": ("dataset=sentences", "schedule=sentences"),
    "bert_tiny": ("dataset=facts", "schedule=facts", "dataset.vocabulary=200"),
}


@pytest.mark.parametrize("model", NETWORKS)
def test_torch_counts_as_many_to_the_unit(model):
    found = outline(f"model={model}", *NETWORKS[model], "dataset.batch_size=4")
    products = observe(found.network, found.inputs).products
    assert not [product for product in products if product.kind == UNKNOWN]
    assert as_torch_counts(products) == counted_by_torch(found.network, found.inputs)
    grouped = [product for product in products if product.groups > 1 and product.kind == LAYER]
    assert bool(grouped) == (model in ("resnext8", "mobilenet_tiny"))


def test_grouped_convolutions_are_products_of_their_groups():
    model, inputs = on_meta(lambda: nn.Conv2d(6, 12, 3, stride=2, padding=1, groups=3, dilation=2), shape=(2, 6, 9, 9))
    (product,) = observe(model, inputs).products
    # 9 + 2 - 2 * 2 - 1 = 6 places, every second of them and the first: 4
    assert (product.groups, product.rows, product.inner, product.columns) == (3, 2 * 4 * 4, 2 * 9, 4)
    assert product.elements == (2 * 6 * 81, 12 * 18, 2 * 12 * 16)


def test_what_is_frozen_has_no_gradient():
    model, inputs = on_meta(lambda: nn.Linear(4, 5), lambda: nn.Linear(5, 3), shape=(7, 4))
    model[0].weight.requires_grad_(False)
    model[0].bias.requires_grad_(False)
    products = observe(model, inputs).products
    assert [product.wants for product in products] == [(False, False), (False, True)]
    assert [product.macs for product in products] == [7 * 4 * 5, 7 * 5 * 3]


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(8), nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        x = self.norm(x)
        return self.attention(x, x, x, need_weights=False)[0]


def test_attention_has_two_projections_and_two_products_of_activations():
    with torch.device("meta"):
        model, x = Attention(), torch.empty(3, 5, 8)
    work = observe(model, {"x": x})
    found = [(product.layer, product.kind, product.macs) for product in work.products]
    assert found == [
        ("attention.in_proj", LAYER, 3 * 5 * 8 * 24),
        ("attention", ATTENTION, 3 * 2 * 5 * 5 * 4),
        ("attention", ATTENTION, 3 * 2 * 5 * 5 * 4),
        ("attention.out_proj", LAYER, 3 * 5 * 8 * 8),
    ]
    (norm,) = work.outside
    assert (norm.layer, norm.kind, norm.elements) == ("norm", "normalisation", 3 * 5 * 8)


def test_layers_that_read_one_tensor_share_a_source():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.c(self.a(x) + self.b(x))

    with torch.device("meta"):
        model, x = Branches(), torch.empty(2, 4)
    a, b, c = (product.source for product in observe(model, {"x": x}).products)
    assert a == b != c


def test_a_kind_that_is_not_understood_is_counted_by_torchs_formula_or_named_without_a_number():
    model, inputs = on_meta(lambda: nn.ConvTranspose2d(3, 4, 2, stride=2), lambda: nn.Conv2d(4, 2, 1))
    unknown, known = observe(model, inputs).products
    assert (unknown.layer, unknown.kind, unknown.what, unknown.macs) == (
        "0",
        UNKNOWN,
        "ConvTranspose2d",
        2 * 64 * 3 * 16,
    )
    assert unknown.elements == (inputs["input"].numel(), 3 * 4 * 2 * 2, 4 * inputs["input"].numel() // 3 * 4)
    assert known.kind == LAYER

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.both = nn.Bilinear(3, 4, 5)

        def forward(self, x, y):
            return self.both(x, y)

    with torch.device("meta"):
        pair, x, y = Pair(), torch.empty(2, 3), torch.empty(2, 4)
    (product,) = observe(pair, {"x": x, "y": y}).products
    assert (product.layer, product.kind, product.what) == ("both", UNKNOWN, "Bilinear")
    assert product.macs is None


def test_a_product_outside_of_layers_is_named():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return F.linear(self.layer(x), self.layer.weight)

    with torch.device("meta"):
        model, x = Tied(), torch.empty(2, 4)
    inside, outside = observe(model, {"x": x}).products
    assert inside.kind == LAYER
    assert (outside.layer, outside.kind, outside.macs) == ("", UNKNOWN, 32)
    assert "outside of layers" in outside.what


@pytest.mark.usefixtures("by_operators")
@pytest.mark.parametrize("model", ["resnext8", "vit_tiny"])
def test_a_real_step_multiplies_what_was_counted_on_the_meta_device(model, monkeypatch):
    overrides = f"model={model}", "dataset.batch_size=4"
    found, recipe = outline(*overrides), luqrun.recipe("luq")
    high = high_precision_layers(found.network, recipe)
    gemms = gemms_of(observe(found.network, found.inputs).products, recipe, high)
    counted = sorted((gemm.gemm, gemm.macs) for gemm in gemms if gemm.width == 4)
    seen = []

    def watched(name, multiply):
        def call(op, first, second, *rest):
            result = multiply(op, first, second, *rest)
            w = {"fprop": second.draws[0], "dgrad": second.draws[0], "wgrad": result}[name]
            out = {"fprop": result, "dgrad": first.draws[0], "wgrad": first.draws[0]}[name]
            pixels = out.shape[0] * out[0, 0].numel() if isinstance(op, ConvOp) else out.numel() // out.shape[-1]
            seen.append((name, pixels * w.numel()))
            return result

        return call

    for name in ("fprop", "dgrad", "wgrad"):
        multiply = getattr(function, name)
        monkeypatch.setattr(function, name, watched(name, multiply))
    with quiet_machine():
        real = outline(*overrides).network.to_empty(device="cpu")
        for parameter in real.parameters():
            nn.init.normal_(parameter, std=0.1)
        network = luqrun.quantize_model(real, recipe)
        assert {name for name, _ in quantized_layers(network)}.isdisjoint(high)
        (shape,) = (each.shape for each in found.inputs.values())
        network(torch.randn(shape)).sum().backward()
    assert sorted(seen) == counted
