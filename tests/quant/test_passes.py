"""A layer's passes in one call each have the bits, and the strides, of its operators' one by one."""

import contextlib
import copy
import functools

import pytest
import torch
from int8_inputs import prepared_anew
from layers import E3M0, HINDSIGHT, INT4, quantize
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import luqrun
from luqrun.quant import routes, sharing
from luqrun.quant.convert import set_step, unchanged_weights
from luqrun.quant.kernels.cpu import driver, int8_tiles, passes, sizes
from luqrun.quant.quantizer import Quantizer
from luqrun.quant.recipe import Recipe

LAST = torch.channels_last
pytestmark = pytest.mark.skipif(not int8_tiles.is_there(), reason="needs AVX-512 VNNI")

LAYERS = {
    "linear": (lambda: nn.Linear(33, 20), (6, 33)),
    "linear, batches": (lambda: nn.Linear(64, 48, bias=False), (3, 7, 64)),
    "3 x 3": (lambda: nn.Conv2d(16, 24, 3, padding=1, bias=False), (3, 16, 9, 8)),
    "strided": (lambda: nn.Conv2d(5, 7, 3, stride=2, padding=1), (2, 5, 11, 9)),
    "some pixels get nothing": (lambda: nn.Conv2d(8, 16, 1, stride=2, bias=False), (2, 8, 6, 7)),
    "pointwise": (lambda: nn.Conv2d(32, 16, 1), (2, 32, 5, 5)),
    "uneven": (lambda: nn.Conv2d(3, 40, (1, 3), stride=(2, 1), padding=(0, 2)), (2, 3, 7, 4)),
    "dilated": (lambda: nn.Conv2d(8, 8, (3, 1), dilation=(2, 1)), (2, 8, 9, 4)),
    "groups": (lambda: nn.Conv2d(32, 64, 3, padding=1, groups=2, bias=False), (2, 32, 6, 6)),
}
RECIPES = {
    "luq": luqrun.recipe("luq"),
    "biased": luqrun.recipe("biased_log"),
    "integers": Recipe.of("integers", Quantizer("int3"), Quantizer("int5"), Quantizer("int4", rounding="stochastic")),
}


@pytest.fixture
def counted(monkeypatch):
    """[forward, backward] passes in one call."""
    found = [0, 0]
    for place, name in enumerate(("forward", "backward")):
        real = getattr(passes.LayerPass, name)

        def call(self, *arguments, real=real, place=place):
            found[place] += 1
            return real(self, *arguments)

        monkeypatch.setattr(passes.LayerPass, name, call)
    return found


def made(name, recipe="luq", dtype=torch.float32):
    """A layer and what it reads, in the memory format of training."""
    torch.manual_seed(1)
    make, shape = LAYERS[name]
    layer, x = quantize(make().to(dtype), RECIPES[recipe]), torch.randn(shape).to(dtype)
    return (layer.to(memory_format=LAST), x.to(memory_format=LAST)) if len(shape) == 4 else (layer, x)


def trained(layer, x, steps=3, bf16=False, contiguous=False):
    """Outputs and gradients of some steps."""
    layer, found = copy.deepcopy(layer), []
    for step in range(steps):
        set_step(layer, step)
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        read = leaf.view_as(leaf)  # whose gradient keeps the strides it comes with
        read.register_hook(found.append)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            y = layer(read)
        g = torch.linspace(-1, 1, y.numel()).sin().view(y.shape).to(y.dtype)
        y.backward(g if contiguous or g.dim() < 4 else g.to(memory_format=LAST))
        found += [y.detach(), *(parameter.grad for parameter in layer.parameters())]
    return found


def assert_alike(found, expected):
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert one.stride() == other.stride()
        assert torch.equal(one.isnan(), other.isnan())
        assert torch.equal(one.nan_to_num(), other.nan_to_num())


def one_by_one(monkeypatch, call):
    with monkeypatch.context() as patch:
        patch.setattr(passes, "MOST", 0)
        return call()


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


@pytest.mark.parametrize("contiguous", [False, True])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", [name for name in LAYERS if name != "groups"])
def test_small_layers(name, recipe, contiguous, counted, monkeypatch):
    layer, x = made(name, recipe)
    found = trained(layer, x, contiguous=contiguous)
    assert counted == [3, 3]
    assert_alike(found, one_by_one(monkeypatch, lambda: trained(layer, x, contiguous=contiguous)))
    assert counted == [3, 3]


@pytest.mark.parametrize("few_products", [0, 1 << 30])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", LAYERS)
def test_larger_layers_from_the_step_on_in_which_their_gemms_are_known(
    name, recipe, few_products, counted, blocks_win, monkeypatch
):
    monkeypatch.setattr(sizes, "FEW", 0)  # they pack what they keep
    monkeypatch.setattr(passes, "FEW_PRODUCTS", few_products)  # of linear layers, blocks or a library
    layer, x = made(name, recipe)
    found = trained(layer, x)
    assert counted == [2, 2]
    assert_alike(found, one_by_one(monkeypatch, lambda: trained(layer, x)))


@pytest.mark.parametrize("name", ["linear", "3 x 3"])
@pytest.mark.parametrize("threads", [1, 3])
def test_more_threads_and_bf16(name, threads, counted, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for dtype, autocast in ((torch.float32, False), (torch.bfloat16, False), (torch.float32, True)):
        prepared_anew()
        layer, x = made(name, dtype=dtype)
        x = x.bfloat16() if autocast else x
        counted[:] = [0, 0]
        found = trained(layer, x, bf16=autocast)
        assert counted == [3, 3]
        alone = functools.partial(trained, layer, x, bf16=autocast)
        assert_alike(found, one_by_one(monkeypatch, alone))


@pytest.mark.parametrize("positive", [False, True], ids=["signed weights", "unsigned weights"])
@pytest.mark.parametrize("name", ["linear", "strided"])
def test_numbers_without_end_zeros_and_signs(name, positive, counted, monkeypatch):
    layer, x = made(name)
    if positive:
        layer.weight.data.abs_()
    nan = x.clone()
    nan[(1,) * x.dim()] = torch.nan
    for each in (torch.zeros_like(x), nan, x.abs(), x):
        assert_alike(trained(layer, each), one_by_one(monkeypatch, functools.partial(trained, layer, each)))
    assert counted == [12, 12]


def test_what_is_larger_is_not_settled_by_a_slower_way(counted, blocks_win, monkeypatch):
    monkeypatch.setattr(sizes, "FEW", 0)
    layer, x = made("3 x 3")
    trained(layer, x, steps=1)
    key = next(key for key in routes._chosen if key[0][0] == "dgrad")
    routes._chosen[key] = ["libraries", "blocks of ours"]
    trained(layer, x)
    assert counted == [0, 0]


def test_layers_that_read_one_tensor_quantize_it_once(counted, blocks_win, monkeypatch):
    monkeypatch.setattr(sizes, "FEW", 0)
    layers = quantize(nn.ModuleList([nn.Linear(16, 12), nn.Linear(16, 12), nn.Linear(12, 8)]), RECIPES["luq"])
    for step in range(3):
        set_step(layers, step)
        x = torch.randn(9, 16, requires_grad=True)
        layers[2](layers[0](x) + layers[1](x)).sum().backward()
    assert counted == [2, 2]  # of the third


class Checkpointed(nn.Sequential):
    """Each layer in a checkpoint of its own."""

    def forward(self, x):
        for layer in self:
            x = checkpoint(layer, x, use_reentrant=False)
        return x


@pytest.mark.parametrize("few", [0, sizes.FEW])
def test_checkpoints(few, counted, blocks_win, monkeypatch):
    """Their second forward keeps what the first one kept, whatever has become known between the two."""
    monkeypatch.setattr(sizes, "FEW", few)
    for name in ("linear", "3 x 3"):
        layer, x = made(name)
        counted[:] = [0, 0]
        found = trained(Checkpointed(layer), x)
        assert counted == [0, 0]
        assert_alike(found, trained(layer, x))
    make, shape = lambda: nn.Conv2d(32, 32, 3, padding=1, groups=2), (2, 32, 6, 6)
    alike = quantize(Checkpointed(*(make() for _ in range(3))), RECIPES["luq"]).to(memory_format=LAST)
    trained(alike, torch.randn(shape).to(memory_format=LAST))  # a backward tells what the next one's forward asks


@pytest.mark.parametrize("first", [False, True], ids=["backward", "forward"])
@pytest.mark.parametrize("name", ["profiler", "weights that do not change"])
def test_checkpoints_of_which_one_pass_is_another(name, first, counted):
    layer, x = made("linear")
    around = {"profiler": torch.profiler.profile, "weights that do not change": lambda: unchanged_weights(layer)}[name]
    leaf = x.clone().requires_grad_()
    with around() if first else contextlib.nullcontext():
        y = checkpoint(layer, leaf, use_reentrant=False)
    with contextlib.nullcontext() if first else around():
        y.square().sum().backward()
    assert leaf.grad.isfinite().all()


def test_codes_of_another_tensor_are_not_held(counted, blocks_win, monkeypatch):
    small, large = quantize(nn.Linear(16, 4), RECIPES["luq"]), quantize(nn.Linear(40, 16), RECIPES["luq"])
    monkeypatch.setattr(passes, "MOST", 100)  # the first one calls its operators
    x = torch.randn(6, 40, requires_grad=True)
    y = small(large(x))
    assert counted == [1, 0]
    assert sharing._last.made is None
    y.sum().backward()


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (3, 2)])
@pytest.mark.parametrize("name", ["linear", "3 x 3"])
def test_a_backward_pass_has_the_threads_of_its_own_time(name, before, after, counted, monkeypatch):
    layer, x = made(name)
    expected = trained(layer, x, steps=1)
    used, told = [], driver.told_of
    monkeypatch.setattr(torch, "get_num_threads", lambda: before)
    monkeypatch.setattr(driver, "threads_for", lambda elements: before)
    prepared_anew()
    monkeypatch.setattr(driver, "told_of", lambda *loop: used.append(torch.get_num_threads()) or told(*loop))
    leaf = x.clone().requires_grad_()
    set_step(layer, 0)
    layer.zero_grad()
    y = layer(leaf)
    monkeypatch.setattr(torch, "get_num_threads", lambda: after)
    monkeypatch.setattr(driver, "threads_for", lambda elements: after)
    used.clear()
    y.backward(torch.linspace(-1, 1, y.numel()).sin().view(y.shape))
    assert set(used) == {after}  # its loops were told anew
    assert torch.equal(leaf.grad, expected[0])
    assert torch.equal(layer.weight.grad, expected[2])
    assert counted == [2, 2]


def test_who_watches_the_backward_pass_alone_sees_operators(counted, blocks_win, monkeypatch):
    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            seen.add(str(function))
            return function(*arguments, **(keywords or {}))

    for few in (sizes.FEW, 0):
        monkeypatch.setattr(sizes, "FEW", few)
        prepared_anew()
        for name in ("linear", "strided", "3 x 3"):
            layer, x = made(name)
            for _ in range(2):  # from here on it is known
                layer(x.clone().requires_grad_()).sum().backward()
            layer.zero_grad()
            gradients = []
            for watch in (False, True):
                seen = set()
                set_step(layer, 5)
                leaf = x.clone().requires_grad_()
                counted[:] = [0, 0]
                y = layer(leaf).sum()
                if watch:
                    with Names():
                        y.backward()
                    assert "luqrun.quantize.default" in seen
                else:
                    y.backward()
                assert counted == [1, int(not watch)]
                gradients.append([leaf.grad, layer.weight.grad])
                layer.weight.grad = None
            assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


def test_a_graph_that_is_kept_gives_its_gradients_again(counted):
    layer, x = made("3 x 3")
    output = layer(x.requires_grad_()).square().sum()
    first = torch.autograd.grad(output, [x, layer.weight], retain_graph=True)
    assert_alike(torch.autograd.grad(output, [x, layer.weight]), first)
    assert counted == [1, 2]


def test_health_is_told(counted, monkeypatch):
    def told():
        layer, x = made("linear")
        layer.health = {}
        layer(x.requires_grad_()).square().sum().backward()
        return layer.health

    found = told()
    assert counted == [1, 1]
    expected = one_by_one(monkeypatch, told)
    assert set(found) == set(expected) == {"activation", "weight", "gradient", "gradient_exponents"}
    for name, value in expected.items():
        assert str(found[name]) == str(value)


@pytest.mark.parametrize("few", [0, sizes.FEW])
def test_what_is_kept(few, counted, blocks_win, monkeypatch):
    """A byte an element of small tensors, half a byte of others."""
    monkeypatch.setattr(sizes, "FEW", few)
    monkeypatch.setattr(passes, "FEW_PRODUCTS", 1 << 30)
    kept, forward = [], passes.LayerPass.forward

    def spy(self, *arguments):
        found = forward(self, *arguments)
        kept.append(found[1].numel())
        return found

    monkeypatch.setattr(passes.LayerPass, "forward", spy)
    torch.manual_seed(1)
    layer, x = quantize(nn.Linear(96, 64), RECIPES["luq"]), torch.randn(50, 96)
    trained(layer, x)
    elements = 96 * (64 + 50)
    for each in kept:
        assert (1 if few else 0.5) <= each / elements <= (1.05 if few else 0.55)
    assert kept


def test_operators_keep_a_byte_of_small_tensors_too(monkeypatch):
    monkeypatch.setattr(passes, "MOST", 0)
    layer, x = made("linear")
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda y: kept.append(y) or y, lambda y: y):
        output = layer(x.requires_grad_())
    codes = [each.numel() for each in kept if each.dim()]
    assert codes == [x.numel(), layer.weight.numel()]
    monkeypatch.setattr(sizes, "FEW", 0)  # packed, it gives the same
    output.sum().backward()
    grad, packed = x.grad, copy.deepcopy(layer)
    packed.zero_grad()
    x.grad = None
    set_step(packed, 0)
    packed(x).sum().backward()
    assert torch.equal(x.grad, grad)
    assert torch.equal(packed.weight.grad, layer.weight.grad)


def test_what_it_is_not_for(counted):
    linear = lambda: nn.Linear(12, 8)  # noqa: E731
    x = torch.randn(5, 12)
    smp = Recipe.of("smp", INT4, INT4, Quantizer("e3m0", rounding="stochastic", samples=2))
    drawn = Recipe.of("drawn", Quantizer("int4", rounding="stochastic"), INT4, E3M0)
    for recipe in (HINDSIGHT, smp, drawn, Recipe.of("weights", weight=INT4), luqrun.recipe("mxfp4_rht_sr")):
        trained(quantize(linear(), recipe), x)
    layer = quantize(linear(), RECIPES["luq"])
    trained(layer.double(), x.double())
    layer = layer.float()
    with unchanged_weights(layer):
        trained(layer, x)
    with torch.no_grad():
        layer(x)
    layer(x)  # whose gradient nobody wants
    layer.weight.requires_grad_(False)
    layer(x.clone().requires_grad_()).sum().backward()
    trained(quantize(nn.Conv2d(1, 1, 3), RECIPES["luq"]), torch.randn(2, 1, 6, 6))  # in either memory order
    contiguous, images = made("3 x 3")
    trained(contiguous.to(memory_format=torch.contiguous_format), images.contiguous())
    assert counted == [0, 0]


def test_a_rehearsal_has_its_loops_and_computes_nothing(counted):
    layer, x = made("linear")
    with driver.rehearsal() as found:
        layer(x.clone().requires_grad_()).sum().backward()
    names = {each.driver.__name__ for each in found}
    assert {"follow", "quantize", "pack_weight", "convolve", "convolve_for_weight", "add_tasks"} <= names
    assert counted == [0, 0]
