"""Quantized layers under what torch offers beside training: tracing, counting, transforms, modes, kinds of tensors."""

import copy
import functools

import pytest
import torch
import torchvision
from layers import HINDSIGHT, LUQ, mlp, quantize, same, train_step
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode
from torchvision import tv_tensors
from torchvision.models.feature_extraction import create_feature_extractor

import luqrun
from luqrun.quant import gemms
from luqrun.quant.kernels import ops


def conv_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 4, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 3),
    )


IMAGES = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))

# Graphs


def test_fx_takes_quantized_layers_as_leaves():
    model = quantize(conv_net())
    traced = torch.fx.symbolic_trace(model)
    assert [node.op for node in traced.graph.nodes].count("call_module") == 6
    luqrun.set_step(model, 0)
    expected = train_step(model, IMAGES)
    luqrun.set_step(traced, 0)
    assert same(expected, train_step(traced, IMAGES))


def test_features_of_a_torchvision_model_are_extracted():
    model = quantize(torchvision.models.resnet18(num_classes=4)).eval()
    x, seen = torch.rand(1, 3, 32, 32), []
    model.layer2.register_forward_hook(lambda *call: seen.append(call[2]))
    features = create_feature_extractor(model, ["layer2", "fc"])(x)
    assert torch.equal(model(x), features["fc"])
    assert torch.equal(seen[-1], features["layer2"])


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x, mask=None):
        return self.attention(x, x, x, key_padding_mask=mask, need_weights=False)[0]


def test_fx_takes_attention_as_a_leaf():
    model, x = quantize(Attends()).eval(), torch.rand(2, 3, 8)
    mask = torch.tensor([[False, False, True], [False, False, False]])
    assert torch.equal(torch.fx.symbolic_trace(model)(x, mask), model(x, mask))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.filterwarnings("ignore")
def test_jit_trace_records_the_evaluation(grad):
    model = quantize(conv_net()).eval()
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(model, IMAGES)
        assert torch.equal(traced(IMAGES), model(IMAGES))
    with pytest.raises(RuntimeError, match="has no gradient"):
        traced(IMAGES).sum().backward()


@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_flops_are_those_of_the_plain_model(kind, int8, monkeypatch):
    monkeypatch.setitem(gemms._int8_devices, "cpu", int8)
    plain, x = (conv_net(), IMAGES) if kind == "conv" else (nn.Linear(8, 4), torch.rand(5, 8))
    counts = []
    for model in (plain, quantize(copy.deepcopy(plain))):
        with FlopCounterMode(display=False) as counter:
            model(x).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("policy", [CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_RECOMPUTE, "products"])
def test_selective_checkpointing_changes_nothing(policy):
    products = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.convolution.default]
    chosen = products if policy == "products" else lambda context, op, *args, **kwargs: policy
    contexts = functools.partial(create_selective_checkpoint_contexts, chosen)
    model = quantize(conv_net())
    twin = copy.deepcopy(model)
    for _ in range(2):
        expected = train_step(model, IMAGES)
        found = train_step(lambda x: checkpoint(twin, x, use_reentrant=False, context_fn=contexts), IMAGES, twin)
        assert same(expected, found)


# What is refused, as torch refuses it


def test_a_gradient_penalty_is_refused_and_acts_on_layers_that_are_skipped():
    critic, x = mlp(), torch.rand(4, 8, requires_grad=True)
    with pytest.raises(luqrun.UserError, match="create_graph=True"):
        torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    plain = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
    model = nn.ModuleDict({"critic": plain, "other": nn.Linear(3, 3)})
    twin = copy.deepcopy(plain)
    luqrun.quantize_model(model, LUQ, skip=["critic.*"])
    found = []
    for each in (plain, twin):
        (slope,) = torch.autograd.grad(each(x).sum(), x, create_graph=True)
        slope.norm(dim=1).square().mean().backward()
        found.append([torch.zeros_like(p) if p.grad is None else p.grad for p in each.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp", "functional_call"])
def test_transforms_are_refused_in_a_line_and_functional_call_works(transform):
    model, x = mlp(), torch.rand(2, 8)
    parameters = dict(model.named_parameters())
    loss = lambda values: torch.func.functional_call(model, values, (x,)).sum()  # noqa: E731
    calls = {
        "grad": lambda: torch.func.grad(loss)(parameters),
        "vmap": lambda: torch.func.vmap(model)(torch.rand(3, 2, 8)),
        "jvp": lambda: torch.func.jvp(model, (x,), (x,)),
        "functional_call": lambda: loss(parameters),
    }
    if transform == "functional_call":
        assert torch.isfinite(calls[transform]())
    else:
        with pytest.raises(luqrun.UserError, match=r"torch\.func"):
            calls[transform]()


def test_many_gradients_at_once_and_forward_mode_are_refused_in_a_line():
    model, x = mlp(), torch.rand(2, 8, requires_grad=True)
    with pytest.raises(luqrun.UserError, match="one gradient at a time"):
        torch.autograd.grad(model(x), x, torch.rand(3, 2, 4), is_grads_batched=True)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(luqrun.UserError, match="forward-mode"):
            model(dual)
        model(x).sum().backward()  # whom it does not follow


@pytest.mark.parametrize("layout", ["sparse", "mkldnn"])
def test_tensors_of_other_layouts_are_refused_in_a_line(layout):
    x = torch.rand(2, 8)
    with pytest.raises(luqrun.UserError, match=layout):
        mlp()(x.to_sparse() if layout == "sparse" else x.to_mkldnn())


@pytest.mark.parametrize("layer", [nn.Linear(4, 3), nn.Conv2d(3, 4, 3), nn.MultiheadAttention(4, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_autocast_gives_the_dtypes_that_it_gives_torch(layer, dtype):
    layer = copy.deepcopy(layer).to(dtype)
    x = torch.rand((2, 3, 8, 8) if isinstance(layer, nn.Conv2d) else (2, 4)).to(dtype)
    inputs = (x, x, x) if isinstance(layer, nn.MultiheadAttention) else (x,)
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = layer(*inputs), quantize(layer)(*inputs)
    expected, found = ((y if isinstance(y, tuple) else (y,)) for y in (expected, found))
    assert [y.dtype for y in found] == [y.dtype for y in expected]


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int8, torch.int64, torch.bool, torch.complex64, torch.float64, torch.bfloat16]
)
@pytest.mark.parametrize("layer", [nn.Linear(4, 3), nn.Conv2d(3, 4, 3), nn.MultiheadAttention(4, 2)], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_inputs_of_another_dtype_are_answered_as_torch_does(dtype, layer, autocast):
    layer = copy.deepcopy(layer)
    x = torch.ones((2, 3, 8, 8) if isinstance(layer, nn.Conv2d) else (2, 4)).to(dtype)
    inputs = (x, x, x) if isinstance(layer, nn.MultiheadAttention) else (x,)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        try:
            layer(*inputs)
            refused = False
        except (RuntimeError, AssertionError):
            refused = True
        layer = quantize(layer)
        if refused:
            with pytest.raises(luqrun.UserError, match="floating"):
                layer(*inputs)
        else:
            layer(*inputs)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(3, 4, 3), (8, 8)),
        (nn.Conv2d(3, 4, 3), (1, 2, 3, 8, 8)),
        (nn.Linear(1, 4), ()),
        (nn.Linear(4, 3), (2, 5)),
    ],
    ids=str,
)
def test_inputs_of_another_shape_are_refused(layer, shape):
    with pytest.raises(RuntimeError, match=r"batched|one dimension|shapes cannot be multiplied"):
        quantize(copy.deepcopy(layer))(torch.rand(shape))


@pytest.mark.parametrize("make", ["jagged", "strided"])
def test_nested_tensors_are_refused_by_layers_and_taken_by_relus(make):
    layout = torch.jagged if make == "jagged" else torch.strided
    x = torch.nested.nested_tensor([torch.rand(2, 4), torch.rand(3, 4)], layout=layout, requires_grad=True)
    model = quantize(nn.Sequential(nn.Linear(4, 8), nn.ReLU()))
    with pytest.raises(RuntimeError):
        model[0](x)
    assert model[1](x).is_nested


def test_a_subclass_with_memory_is_taken():
    layer = quantize(nn.Conv2d(3, 4, 3))
    expected = layer(IMAGES)
    assert torch.equal(layer(tv_tensors.Image(IMAGES)), expected)


def test_a_bias_of_another_dtype_is_refused():
    layer = quantize(nn.Linear(4, 3))
    layer.bias = nn.Parameter(layer.bias.double())
    with pytest.raises(RuntimeError, match="bias"):
        layer(torch.rand(2, 4))


def test_weights_that_are_buffers_compute():
    layer = nn.Linear(4, 3)
    twin = quantize(copy.deepcopy(layer))
    weight = layer.weight.data
    del layer.weight
    layer.register_buffer("weight", weight)
    x = torch.rand(2, 4)
    assert torch.equal(quantize(layer)(x), twin(x))
    del layer.bias
    layer.bias = None
    quantize(layer).to(torch.float32)(x)


# Devices and modes


def test_a_model_converted_without_memory_trains_after_to_empty():
    with torch.device("meta"):
        model = quantize(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), HINDSIGHT)
    assert model(torch.rand(2, 8, device="meta")).device.type == "meta"
    model.to_empty(device="cpu")
    assert all(buffer == 0 for buffer in model.buffers())
    twin = quantize(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), HINDSIGHT)
    model.load_state_dict(twin.state_dict())
    x = torch.rand(2, 8)
    assert same(train_step(model, x), train_step(twin, x))


@pytest.mark.parametrize("mode", [torch.inference_mode, lambda: torch.device("meta")], ids=["inference", "meta"])
@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
def test_a_call_inside_a_mode_leaves_nothing_behind(mode, int8, monkeypatch):
    monkeypatch.setitem(gemms._int8_devices, "cpu", int8)
    model = quantize(conv_net())
    twin = copy.deepcopy(model)
    ops.a_micro_step.cache_clear()
    with mode():
        model(IMAGES)
        moved = quantize(conv_net().to("cpu")) if mode is torch.inference_mode else None
    assert moved is None or moved[0].streams.device.type == "cpu"
    with torch.no_grad():
        twin(IMAGES)
    luqrun.set_step(model, 1), luqrun.set_step(twin, 1)
    assert same(train_step(model, IMAGES), train_step(twin, IMAGES))


@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_layers_of_no_features(shape):
    layer = quantize(nn.Linear(*shape))
    x = torch.rand(3, shape[0], requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert torch.equal(y, layer.bias.expand(3, -1))
    assert layer.weight.grad.shape == layer.weight.shape
