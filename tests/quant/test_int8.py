"""Convolutions on int8 codes against the same ones in int64."""

import threading
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from int8_inputs import (
    GEOMETRIES,
    assert_exact,
    codes,
    conv,
    cropped,
    exact,
    exact_wgrad,
    for_onednn,
    operands,
    results_of,
    take,
)
from kernel_inputs import LAST

from luqrun.errors import UserError
from luqrun.quant.kernels import reference
from luqrun.quant.kernels.cpu import int8, int8_library, int8_products

geometries = pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)


@pytest.fixture(params=["patches", "many chunks", "direct", int8.BLOCKS])
def route(request, monkeypatch):
    """Through patches at once, through blocks of a few rows of them, through oneDNN's convolution, or without them."""
    take(monkeypatch, request.param)
    direct = request.param == "direct"
    monkeypatch.setattr(int8_library, "prefers_direct", lambda patches, channels: direct)
    if request.param == "many chunks":
        monkeypatch.setattr(int8_library, "CHUNK_BYTES", 300)
        monkeypatch.setattr(int8_library, "PRODUCT_BYTES", 300)
    taken = results_of(monkeypatch, "_conv_directly")
    yield taken
    if not direct:
        assert not taken


@geometries
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_conv(geometry, dtype, route):
    # Weights beyond 63 saturate in oneDNN on a CPU without VNNI; then it is not taken.
    scale, direct = torch.tensor(0.0123), int8_library.prefers_direct(None, 0)
    for (low, largest), a_last, w_last, channels_last in product(
        ((-127, 7), (0, 7), (-127, 127)), *[(False, True)] * 3
    ):
        a, w = operands(geometry, low, largest)
        expected = exact(a, w, geometry)
        a = a.to(memory_format=LAST) if a_last else a
        w = w.to(memory_format=LAST) if w_last else w
        route.clear()
        found = conv(a, w, geometry, scale, dtype, channels_last, signed=low < 0)
        assert_exact(found, expected, scale, dtype)
        assert found.is_contiguous(memory_format=LAST if channels_last else torch.contiguous_format)
        if direct and largest == 7:
            assert route == [for_onednn(geometry)] or not int8_library.has_direct_conv()


@geometries
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", ["products", "few products", int8.BLOCKS])
def test_conv_dgrad(geometry, dtype, way, monkeypatch):
    take(monkeypatch, way)
    if way == "few products":
        monkeypatch.setattr(int8_library, "PRODUCT_BYTES", 300)
    _, stride, padding, dilation, *_ = geometry
    a, w = operands(geometry, largest=127)
    g, scale = codes(*exact(a, w, geometry).shape, seed=2), torch.tensor(0.0123)
    at = a.double().requires_grad_()  # whose sums are exact too
    inner, left = cropped(at, padding)
    F.conv2d(inner, w.double(), None, stride, left, dilation).backward(g.double())
    for g_last, w_last, channels_last in product(*[(False, True)] * 3):
        given = g.to(memory_format=LAST) if g_last else g
        weight = w.to(memory_format=LAST) if w_last else w
        how = stride, padding, dilation, dtype, channels_last, torch.tensor(True)
        found = int8.conv_dgrad(given, weight, scale, a.shape, *how)
        assert_exact(found, at.grad, scale, dtype)
        assert found.is_contiguous(memory_format=LAST if channels_last else torch.contiguous_format)


@geometries
@pytest.mark.parametrize("narrow", [0, int8_library.NARROW], ids=["patches", "lines"])
def test_conv_wgrad(geometry, narrow, route, monkeypatch):
    monkeypatch.setattr(int8_library, "NARROW", narrow)
    a, w = operands(geometry)
    size = exact(a, w, geometry).shape
    grads = [codes(*size, seed=seed) for seed in (2, 3, 4)]
    kernel, stride, padding, dilation, *_ = geometry
    for count, a_last, g_last in product((1, 3), (False, True), (False, True)):
        formatted = [g.to(memory_format=LAST) if g_last else g for g in grads[:count]]
        activation = a.to(memory_format=LAST) if a_last else a
        found = int8.conv_wgrad(formatted, activation, kernel, stride, padding, dilation)
        expected = sum(exact_wgrad(g, a, geometry) for g in grads[:count])
        assert found.shape == w.shape
        assert found.dtype == torch.float32
        assert torch.equal(found, expected.float())


@pytest.mark.parametrize("shape", [(5,), (1, 24), (37, 24), (3, 5, 16), (2, 3, 4, 33), (0, 8), (7, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [1, 10, 32])
def test_linear(shape, dtype, columns, route):
    a, w, scale = codes(*shape), codes(columns, shape[-1], seed=1), torch.tensor(0.0123)
    expected = a.long() @ w.t().long()
    for each in (w, w.t().contiguous().t()):
        assert_exact(int8.linear(a, each, scale, dtype, torch.tensor(True), False), expected, scale, dtype)
    unsigned = int8.linear(a & 15, w, scale, dtype, torch.tensor(False), False)
    assert_exact(unsigned, (a & 15).long() @ w.t().long(), scale, dtype)
    g = codes(*expected.shape, seed=2)
    assert_exact(reference.int8_linear(a, w, scale, dtype, torch.tensor(True), False), expected, scale, dtype)
    found = int8.linear(g, w, scale, dtype, torch.tensor(True), True)
    assert_exact(found, g.long() @ w.long(), scale, dtype)
    assert found.is_contiguous()
    for grads in ([g], [g, codes(*g.shape, seed=3)]):
        summed = (
            sum(each.long().reshape(-1, columns) for each in grads) if a.numel() else torch.zeros(0, columns).long()
        )
        expected = summed.t() @ a.long().reshape(len(summed), shape[-1])
        assert torch.equal(int8.linear_wgrad(grads, a), expected.float())
        assert torch.equal(reference.int8_linear_wgrad(grads, a), expected.float())


def test_every_code_and_the_largest_sums(route):
    # All products 127 * 127 over a depth of 3 * 3 * 512: far beyond what float32 holds exactly, and half of int32.
    geometry = (3, 3), (1, 1), (1, 1), (1, 1), (1, 512, 4, 4), 2
    for sign in (1, -1):
        a, w = torch.full((1, 512, 4, 4), 127 * sign).char(), torch.full((2, 512, 3, 3), 127).char()
        assert_exact(conv(a, w, geometry, torch.tensor(1.0)), exact(a, w, geometry), 1.0)
        a.view(-1)[::7], w.view(-1)[::5] = -127, -126
        assert_exact(conv(a, w, geometry, torch.tensor(0.3)), exact(a, w, geometry), torch.tensor(0.3))
    every = torch.arange(-127, 128).char()
    a, w = every.view(1, 255, 1, 1), every.flip(0).view(1, 255, 1, 1)
    padded = (1, 1), (1, 1), (1, 1), (1, 1), (1, 255, 1, 1), 1
    assert_exact(conv(a, w, padded, torch.tensor(1.0)), exact(a, w, padded), 1.0)


def test_weights_of_zeros_and_of_the_least_code(route):
    geometry = (3, 3), (1, 1), (1, 1), (1, 1), (2, 8, 5, 6), 4
    a, _ = operands(geometry)
    for value in (0, 1, -1, -128):
        w = torch.full((4, 8, 3, 3), value).char()
        assert_exact(conv(a, w, geometry, torch.tensor(1.0)), exact(a, w, geometry), 1.0)


@pytest.mark.parametrize("size", [(8, 0, 16, 16), (8, 3, 0, 16), (0, 3, 16, 16)])
@pytest.mark.parametrize("channels", [0, 2])
def test_nothing_to_multiply(size, channels, monkeypatch):
    monkeypatch.setattr(int8_library, "has_amx", lambda: True)
    a, w = torch.ones(size, dtype=torch.int8), torch.ones(channels, size[1], 3, 3, dtype=torch.int8)
    found = conv(a, w, ((3, 3), (1, 1), (1, 1), (1, 1)), torch.tensor(0.5))
    assert found.shape == (size[0], channels, size[2], size[3])
    assert not found.any()


@pytest.mark.parametrize("taken", [True, False])
def test_weight_gradients_by_lines_with_more_padding_than_kernel(taken, monkeypatch):
    # The patches of the gradient then leave out its edge. `taken`: of few input channels they would be too large.
    used = results_of(monkeypatch, "_products_by_lines")
    geometry = (3, 3), (1, 1), (4, 3), (1, 2), (3, 16 if taken else 2, 6, 5), 8
    a, w = operands(geometry)
    g = codes(*exact(a, w, geometry).shape, seed=2)
    found = int8.conv_wgrad([g, g], a, *geometry[:4])
    assert torch.equal(found, 2 * exact_wgrad(g, a, geometry).float())
    assert bool(used) == taken


def test_sums_beyond_int32_of_a_weight_gradient():
    # 2^18 rows of 127 * 127 are 4.2e9: blocks are summed in int64.
    rows = 2**18 + 5
    a, g = torch.full((rows, 1, 1, 1), 127).char(), torch.full((rows, 2, 1, 1), -127).char()
    found = int8.conv_wgrad([g, g], a, (1, 1), (1, 1), (0, 0), (1, 1))
    assert torch.equal(found, torch.full((2, 1, 1, 1), -2 * 127 * 127 * rows).float())
    found = int8.linear_wgrad([g.view(rows, 2)] * 2, a.view(rows, 1))
    assert torch.equal(found, torch.full((2, 1), -2 * 127 * 127 * rows).float())
    a, g = torch.full((2, 1, 1, 2**17), 127).char(), torch.full((2, 1, 1, 2**17), 127).char()
    found = int8.conv_wgrad([g], a, (1, 1), (1, 1), (0, 0), (1, 1))
    assert found.item() == float(2 * 127 * 127 * 2**17)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "scale", [torch.nan, 0.0, 2.0**-149, 2.0**-140, 2.0**-126, 2.0**-100, 2.0**-99, 3e38, torch.inf, 1e-30, 2.0**-133]
)
def test_scales_that_are_hardly_scales(scale, dtype, route):
    for name in ("3 x 3", "strided", "pointwise"):
        for low in (-127, 0):
            a, w = operands(GEOMETRIES[name], low)
            found = conv(a, w, GEOMETRIES[name], torch.tensor(scale), dtype, signed=low < 0)
            assert_exact(found, exact(a, w, GEOMETRIES[name]), torch.tensor(scale), dtype)


@geometries
@pytest.mark.parametrize("channels_last", [False, True])
def test_no_images(geometry, channels_last, route):
    kernel, stride, padding, dilation, size, channels = geometry
    a, w = operands((*geometry[:4], (0, *size[1:]), channels))
    expected = exact(operands(geometry)[0], w, geometry).shape[1:]
    found = conv(a, w, geometry, torch.tensor(1.0), channels_last=channels_last)
    assert found.shape == (0, *expected)
    how = kernel, stride, padding, dilation
    assert torch.equal(int8.conv_wgrad([found.char()], a, *how), torch.zeros(w.shape))
    last = torch.float32, channels_last
    dgrad = int8.conv_dgrad(found.char(), w, torch.tensor(1.0), a.shape, *how[1:], *last, torch.tensor(True))
    assert dgrad.shape == a.shape


def test_images_too_wide_for_a_weight_gradient_are_refused():
    a, pointwise = torch.zeros(1, 1, 1, int8.CHUNK_ROWS + 1).char(), ((1, 1), (1, 1), (0, 0), (1, 1))
    with pytest.raises(UserError, match=str(int8.CHUNK_ROWS)):
        int8.conv_wgrad([a], a, *pointwise)


def test_no_features():
    pointwise = (1, 1), (1, 1), (0, 0), (1, 1)
    a, w = torch.zeros(3, 0, 1, 1).char(), torch.zeros(2, 0, 1, 1).char()
    assert torch.equal(conv(a, w, pointwise, torch.tensor(1.0)), torch.zeros(3, 2, 1, 1))
    assert int8.conv_wgrad([torch.ones(3, 2, 1, 1).char()], a, *pointwise).shape == (2, 0, 1, 1)


def test_memory_that_is_not_aligned(route):
    for name in ("3 x 3", "3 x 3, odd channels", "pointwise"):
        geometry = GEOMETRIES[name]
        a, w = operands(geometry)
        base = torch.zeros(a.numel() + 3, dtype=torch.int8)
        for offset in (1, 3):
            images, channels, height, width = a.shape
            shifted = base[offset : offset + a.numel()].view(images, height, width, channels).permute(0, 3, 1, 2)
            shifted.copy_(a)
            assert_exact(conv(shifted, w, geometry, torch.tensor(1.0)), exact(a, w, geometry), 1.0)


def test_operands_stay_as_they_are(route):
    geometry = GEOMETRIES["3 x 3"]
    a, w = operands(geometry)
    scale, before = torch.tensor(0.5), (a.clone(), w.clone())
    first = conv(a, w, geometry, scale, channels_last=True)
    kept = first.clone()
    conv(-a, w, geometry, scale, channels_last=True)  # uses the scratch memory again
    assert torch.equal(first, kept)
    assert torch.equal(a, before[0])
    assert torch.equal(w, before[1])


def test_two_threads_at_once(route):
    """Each thread's blocks of patches are its own."""
    failures, ready = [], threading.Barrier(2)

    def work(name, seed):
        geometry = GEOMETRIES[name]
        kernel, stride, padding, dilation, size, channels = geometry
        a, w = (
            codes(8 * size[0], *size[1:], seed=seed),
            codes(channels, size[1], *kernel, low=-7, high=7, seed=seed + 1),
        )
        expected = exact(a, w, geometry)
        g = codes(*expected.shape, seed=seed + 2)
        gradient = exact_wgrad(g, a, geometry).float()
        ready.wait()
        for _ in range(60):
            found = conv(a, w, geometry, torch.tensor(1.0))
            failures.extend([name] * (not torch.equal(found, expected.float())))
            found = int8.conv_wgrad([g], a, kernel, stride, padding, dilation)
            failures.extend([name] * (not torch.equal(found, gradient)))

    threads = [threading.Thread(target=work, args=arguments) for arguments in (("3 x 3", 10), ("dilated", 20))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert not failures


@pytest.mark.parametrize(("rows", "depth", "columns"), list(product((1, 2, 5), (1, 2, 8), (1, 3, 16))))
def test_products_of_thin_matrices_in_every_layout(rows, depth, columns):
    lefts = codes(rows, depth), codes(depth, rows, seed=1).t()
    rights = codes(depth, columns, seed=2), codes(columns, depth, seed=3).t()
    for a, b in product(lefts, rights):
        assert torch.equal(int8_products.multiply(a, b).long(), a.long() @ b.long())
