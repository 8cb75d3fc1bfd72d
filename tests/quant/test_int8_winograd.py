"""3x3 convolutions on int8 codes by Winograd's tiles: exact for any sizes and codes, or refused."""

import pytest
import torch
import torch.nn.functional as F
from int8_inputs import assert_exact, codes, conv, cropped, exact, exact_wgrad, operands, take
from kernel_inputs import LAST

from luqrun.quant import routes
from luqrun.quant.gemms import ConvOp
from luqrun.quant.kernels.cpu import driver, int8, int8_tiles, int8_winograd

pytestmark = pytest.mark.skipif(not int8_tiles.is_there(), reason="needs AVX-512 VNNI")
ONE = (1, 1)
# images, lines, columns, padding; lines and columns that tiles of 2x2 outputs do not fill, and images of one output
SIZES = {
    "whole tiles": (3, 8, 6, (1, 1)),
    "odd": (2, 7, 9, (1, 1)),
    "no padding": (2, 6, 7, (0, 0)),
    "all padding": (2, 5, 4, (2, 2)),
    "uneven padding": (1, 5, 6, (2, 0)),
    "one pixel": (5, 1, 1, (1, 1)),
    "one output": (4, 3, 3, (0, 0)),
    "a line": (2, 1, 13, (1, 1)),
    "much padding": (2, 3, 4, (3, 4)),
    "cut": (2, 8, 9, (-1, -2)),
    "more than a block": (2, 17, 16, (1, 1)),
}
CHANNELS = [(16, 16), (16, 48), (32, 64), (48, 32), (80, 16)]
sizes = pytest.mark.parametrize(("images", "height", "width", "padding"), SIZES.values(), ids=SIZES)
channels = pytest.mark.parametrize(("inputs", "outputs"), CHANNELS)
# Of a gradient, a sum of four neighbours may leave int8; of all codes, sums of two do.
LIMITS = [(0, 15), (-7, 7), (-64, 64), (-128, 127)]


# B^T and G of the paper, the last without its halves.
OF_IMAGE = torch.tensor([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]]).double()
OF_GRADIENT = torch.tensor([[1, 0], [1, 1], [1, -1], [0, 1]]).double()


@pytest.fixture(autouse=True)
def any_size(monkeypatch):
    monkeypatch.setattr(int8_winograd, "FEWEST_PRODUCTS", 1)


@pytest.fixture
def winograd(monkeypatch):
    """All GEMMs are made by tiles; any number of their numbers may be left out of int8."""

    def taken(gemm, x, geometry, groups, rest, ours, library):
        result = ours[int8.WINOGRAD]()
        assert result is not None
        return result

    monkeypatch.setattr(int8, "_by_the_fastest", taken)
    monkeypatch.setattr(int8_winograd, "SCARCE", 1)


def beyond(x, transform, padding):
    """How many numbers of the tiles of x are not of int8."""
    side = transform.shape[1]
    even = [size % 2 for size in x.shape[2:]]
    padded = F.pad(x.double(), (padding[1], padding[1] + even[1], padding[0], padding[0] + even[0]))
    tiles = padded.unfold(2, side, 2).unfold(3, side, 2)
    made = transform @ tiles @ transform.t()
    return int(((made < -128) | (made > 127)).sum())


def geometry_of(images, height, width, padding, inputs, outputs):
    return (3, 3), ONE, padding, ONE, (images, inputs, height, width), outputs


@sizes
@channels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fprop(images, height, width, padding, inputs, outputs, dtype, winograd):
    geometry, scale = geometry_of(images, height, width, padding, inputs, outputs), torch.tensor(0.0123)
    assert int8_winograd.suits(geometry[:4], inputs, outputs, 1)
    for low, high in LIMITS:
        a, (_, w) = codes(*geometry[4], low=low, high=high), operands(geometry)
        assert_exact(conv(a, w, geometry, scale, dtype, signed=low < 0), exact(a, w, geometry), scale, dtype)


@sizes
@channels
def test_dgrad_of_a_layer(images, height, width, padding, inputs, outputs, winograd):
    """Of a stride of 1 it is a convolution of the gradient."""
    geometry, scale = geometry_of(images, height, width, padding, inputs, outputs), torch.tensor(0.0123)
    op, w, yes = ConvOp(ONE, padding, ONE, 1), operands(geometry)[1], torch.tensor(True)
    for low, high in LIMITS:
        g = codes(images, outputs, height + 2 * padding[0] - 2, width + 2 * padding[1] - 2, low=low, high=high, seed=2)
        a = torch.zeros(geometry[4], dtype=torch.float64, requires_grad=True)
        inner, left = cropped(a, padding)
        F.conv2d(inner, w.double(), padding=left).backward(g.double())
        assert_exact(op.int8_dgrad(g, w, scale, torch.float32, yes, a.shape), a.grad, scale)


@sizes
@channels
@pytest.mark.parametrize("count", [1, 3])
def test_wgrad(images, height, width, padding, inputs, outputs, count, winograd, monkeypatch):
    geometry = geometry_of(images, height, width, padding, inputs, outputs)
    for (low, high), chunk in zip([(0, 15), (-7, 7), (-31, 31)], (1, 1 << 13, 1 << 20), strict=True):
        monkeypatch.setattr(int8_winograd, "CHUNK_BYTES", (chunk, chunk))
        a = codes(*geometry[4], low=low, high=high)
        size = images, outputs, height + 2 * padding[0] - 2, width + 2 * padding[1] - 2
        grads = [codes(*size, low=-64, high=64, seed=seed) for seed in range(count)]
        grads[0] = torch.where(grads[0].abs() > 60, grads[0].sign() * 64, grads[0] // 8).char()  # few sums leave int8
        found = int8.conv_wgrad(grads, a, *geometry[:4])
        assert torch.equal(found, sum(exact_wgrad(g, a, geometry) for g in grads).float())


def in_last(*tensors):
    return [each.to(memory_format=LAST) for each in tensors]


def test_what_does_not_fit_is_refused_and_made_by_another_way(monkeypatch):
    take(monkeypatch, int8.WINOGRAD)
    geometry, scale = geometry_of(2, 6, 5, (1, 1), 16, 32), torch.tensor(1.0)
    (a, w), out = operands(geometry, largest=127), torch.empty(2, 32, 6, 5).to(memory_format=LAST)
    (last,) = in_last(a)
    assert not int8_winograd.conv(last, *in_last(w), scale, (1, 1), out)
    assert not int8_winograd.conv(last, *in_last(w // 10), scale, (1, 1), out)  # too many of the image
    assert_exact(conv(a, w, geometry, scale), exact(a, w, geometry), scale)
    assert_exact(conv(a, w // 10, geometry, scale), exact(a, w // 10, geometry), scale)
    g = codes(2, 32, 6, 5, seed=2)
    assert int8_winograd.conv_wgrad(in_last(g), last, (1, 1)) is None  # too many gradients
    assert torch.equal(int8.conv_wgrad([g], a, *geometry[:4]), exact_wgrad(g, a, geometry).float())


@pytest.mark.parametrize(
    "one", [(0, 0, 0, 0), (0, 17, 2, 1), (4, 31, 1, 1), (31, 32, 0, 2), (47, 47, 2, 2), (16, 5, 1, 0)]
)
def test_one_weight_that_does_not_fit(one):
    inputs, outputs, line, column = one
    geometry = geometry_of(1, 4, 4, (1, 1), 48, 48)
    a, w = operands(geometry, low=0)
    out = torch.empty(1, 48, 4, 4).to(memory_format=LAST)
    how = torch.tensor(1.0), (1, 1), out
    assert int8_winograd.conv(*in_last(a % 16, w), *how)
    w[outputs, inputs] = 0
    w[outputs, inputs, line] = 60
    w[outputs, inputs, :, column] = 60
    assert not int8_winograd.conv(*in_last(a % 16, w), *how)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("pixel", [(0, 0, 0, 0), (2, 31, 5, 3), (1, 47, 7, 7), (2, 16, 7, 1)])
def test_one_image_of_a_weight_gradient_that_does_not_fit(pixel, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    a, g = codes(3, 48, 9, 9, low=0, high=15), codes(3, 16, 9, 9, low=-7, high=7, seed=1)
    assert int8_winograd.conv_wgrad(in_last(g), *in_last(a), (1, 1)) is not None
    image, channel, line, column = pixel
    a[image, channel, max(line - 1, 0) : line + 2, max(column - 1, 0) : column + 2] = 100
    assert int8_winograd.conv_wgrad(in_last(g), *in_last(a), (1, 1)) is None


@pytest.mark.parametrize("threads", [1, 3])
def test_as_many_numbers_as_are_allowed_are_left_out(threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    # Images of one task each: 4 tiles of 16 channels, which are 1024 numbers.
    a, g = torch.zeros(3, 16, 4, 4).char(), codes(3, 16, 4, 4, low=-7, high=7, seed=1)
    a[:, 3, 1:3, 0:3] = torch.tensor([[100, 90, -90], [80, 127, -128]]).char()
    geometry, scale = geometry_of(3, 4, 4, (1, 1), 16, 16), torch.tensor(1.0)
    w, out = operands(geometry)[1], torch.empty(3, 16, 4, 4).to(memory_format=LAST)
    count = beyond(a[:1], OF_IMAGE, (1, 1))
    monkeypatch.setattr(int8_winograd, "POINT_BYTES", 1)
    monkeypatch.setattr(int8_winograd, "TASKS", 4)
    for scarce, fits in ((1024 // count, True), (1024 // count + 1, False)):
        monkeypatch.setattr(int8_winograd, "SCARCE", scarce)
        if threads == 3:
            assert int8_winograd.conv(*in_last(a, w), scale, (1, 1), out) == fits
            if fits:
                assert_exact(out, exact(a, w, geometry), scale)
    g[:, 5, 0:2, 2:4] = torch.tensor([[64, 64], [1, -128]]).char()
    a = codes(*a.shape, low=0, high=15)
    count = beyond(g[:1], OF_GRADIENT, (0, 0))
    for scarce, fits in ((1024 // count, True), (1024 // count + 1, False)):
        monkeypatch.setattr(int8_winograd, "SCARCE", scarce)
        found = int8_winograd.conv_wgrad(in_last(g), *in_last(a), (1, 1))
        assert (found is not None) == fits
        if fits:
            assert torch.equal(found, exact_wgrad(g, a, geometry).float())


def test_weights_at_the_edge_of_int8(winograd):
    # 9 taps of 14 give a sum of 126; of -128 in all, and beyond, only some signs do.
    geometry, scale = geometry_of(1, 4, 4, (1, 1), 16, 16), torch.tensor(1.0)
    a, out = codes(*geometry[4], low=-128), torch.empty(1, 16, 4, 4).to(memory_format=LAST)
    cases = {
        (14,) * 9: True,
        (127, 0, 0) * 3: False,
        (127, *[0] * 8): True,
        (*[-14] * 8, -16): True,
        (*[-14] * 8, -17): False,
        (-128, 0, 127, 0, 0, 0, 127, 0, -128): True,
    }
    for numbers, fits in cases.items():
        w = torch.tensor(numbers).char().view(3, 3).expand(16, 16, 3, 3)
        assert int8_winograd.conv(*in_last(a, w), scale, (1, 1), out) == fits
        if fits:
            assert_exact(out, exact(a, w, geometry), scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("outputs", [16, 32, 48])
def test_nothing_is_written_beside_the_outputs(dtype, outputs):
    geometry = geometry_of(2, 5, 7, (1, 1), 16, outputs)
    a, w = operands(geometry)
    a, size = a % 16, 2 * 5 * 7 * outputs
    memory = torch.full((size + 128,), 7, dtype=dtype)
    out = memory[64 : 64 + size].view(2, 5, 7, outputs).permute(0, 3, 1, 2)
    assert int8_winograd.conv(*in_last(a, w), torch.tensor(0.3), (1, 1), out)
    assert_exact(out, exact(a, w, geometry), torch.tensor(0.3), dtype)
    assert (memory[:64] == 7).all()
    assert (memory[64 + size :] == 7).all()


@pytest.mark.parametrize("threads", [1, 3, 8])
@pytest.mark.parametrize("images", [1, 2, 7])
def test_work_is_divided_among_threads(threads, images, winograd, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for bytes_ in (1, 1 << 20):
        monkeypatch.setattr(int8_winograd, "POINT_BYTES", bytes_)
        geometry, scale = geometry_of(images, 9, 8, (1, 1), 32, 48), torch.tensor(0.3)
        a, w = operands(geometry, low=0)
        a = a % 16
        assert_exact(conv(a, w, geometry, scale, signed=False), exact(a, w, geometry), scale)
        g = codes(images, 48, 9, 8, low=-15, high=15, seed=2)
        assert torch.equal(int8.conv_wgrad([g], a, *geometry[:4]), exact_wgrad(g, a, geometry).float())


def test_the_largest_sums(winograd, monkeypatch):
    # As many channels as are allowed, of the codes and the weights with the largest products.
    most = int8_winograd.MOST_CHANNELS // 16 * 16
    geometry, scale = geometry_of(1, 3, 3, (1, 1), most, 16), torch.tensor(1.0)
    for number, tap in ((-128, 14), (127, -14), (-128, -14)):
        a, w = torch.full(geometry[4], number).char(), torch.full((16, most, 3, 3), tap).char()
        assert_exact(conv(a, w, geometry, scale), exact(a, w, geometry), scale)
    # More tiles than int32 holds four times the sums of, if memory would do.
    monkeypatch.setattr(int8_winograd, "CHUNK_BYTES", (1 << 30, 1 << 30))
    pixels = 10 * int8_winograd.MOST_TILES
    a, g = torch.full((1, 16, 2, pixels), -32).char(), torch.full((1, 16, 2, pixels), -128).char()
    found = int8.conv_wgrad([g] * 2, a, *geometry[:4])
    assert found[..., 1, 1].unique().item() == 2 * 2 * pixels * 32 * 128


def test_where_tiles_serve(monkeypatch):
    monkeypatch.setattr(int8_winograd, "FEWEST_PRODUCTS", 1000)
    fits = (3, 3), ONE, (1, 1), ONE
    assert int8_winograd.suits(fits, 16, 32, 2)
    assert not int8_winograd.suits(fits, 16, 32, 1)  # too few products
    for inputs, outputs in ((8, 16), (16, 24), (0, 16), (int8_winograd.MOST_CHANNELS // 16 * 16 + 16, 16)):
        assert not int8_winograd.suits(fits, inputs, outputs, 1000)
    for place, other in ((0, (3, 1)), (0, (5, 5)), (1, (1, 2)), (3, (2, 2))):
        assert not int8_winograd.suits((*fits[:place], other, *fits[place + 1 :]), 16, 16, 1000)
    monkeypatch.setattr(int8_tiles, "is_there", lambda: False)
    assert not int8_winograd.suits(fits, 16, 32, 2)


@pytest.mark.parametrize("scale", [torch.nan, torch.inf, 0.0, 1e-42, 3e38])
def test_any_scale(scale, winograd):
    geometry, scale = geometry_of(2, 5, 6, (1, 1), 16, 32), torch.tensor(scale)
    a, w = operands(geometry)
    a[0] = 0
    assert_exact(conv(a, w, geometry, scale), exact(a, w, geometry), scale)


def test_they_are_compared_with_the_other_ways_when_a_size_comes_first(monkeypatch):
    monkeypatch.setattr(routes, "_chosen", {})
    compared = []
    real = int8.fastest
    monkeypatch.setattr(int8, "fastest", lambda key, ways: compared.append([*ways]) or real(key, ways))
    geometry = geometry_of(2, 6, 5, (1, 1), 16, 32)
    a, w = operands(geometry)
    assert_exact(conv(a, w, geometry, torch.tensor(0.3)), exact(a, w, geometry), torch.tensor(0.3))
    int8.conv_wgrad([codes(2, 32, 6, 5)], a, *geometry[:4])
    assert compared == [[int8.BLOCKS, int8.WINOGRAD, "libraries"]] * 2
    with driver.rehearsal() as versions:
        conv(a, w, geometry, torch.tensor(0.3))
        int8.conv_wgrad([codes(2, 32, 6, 5)], a, *geometry[:4])
    names = {version.driver.__name__ for version in versions}
    assert {"transform_weight", "convolve_points", "transform", "multiply_points"} <= names


def test_batches_of_which_only_some_are_large_enough(monkeypatch):
    """Of 15 images it is chosen, of 9, which are of the same class of sizes, there is no such way."""
    monkeypatch.setattr(routes, "_chosen", {})
    monkeypatch.setattr(int8_winograd, "FEWEST_PRODUCTS", 12 * 8 * 8 * 16 * 16)
    geometry, scale = geometry_of(15, 8, 8, (1, 1), 16, 16), torch.tensor(0.3)
    a, w = operands(geometry)
    for first in (int8.WINOGRAD, int8.BLOCKS):
        routes._chosen.clear()
        for images in (15, 9, 15):
            assert_exact(conv(a[:images], w, geometry, scale), exact(a[:images], w, geometry), scale)
            g = codes(images, 16, 8, 8, low=-7, high=7)
            found = int8.conv_wgrad([g], a[:images] % 16, *geometry[:4])
            assert torch.equal(found, exact_wgrad(g, a[:images] % 16, geometry).float())
            for names in routes._chosen.values():
                names.sort(key=lambda name, first=first: name != first)
