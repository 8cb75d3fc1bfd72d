"""Convolutions on int8 codes by our own blocks: in which pieces, where they are taken, and that they are exact."""

import pytest
import torch
from int8_inputs import GEOMETRIES, assert_exact, codes, conv, exact, exact_wgrad, operands, prepared_anew, take
from kernel_inputs import LAST, assert_identical

from luqrun.internals import of_numba
from luqrun.quant import routes
from luqrun.quant.kernels import reference
from luqrun.quant.kernels.cpu import driver, int8, int8_tiles, int8_tiles_wgrad

geometries = pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
POINTWISE = (1, 1), (1, 1), (0, 0), (1, 1)
THREE = (3, 3), (1, 1), (1, 1), (1, 1)
needs_tiles = pytest.mark.skipif(not int8_tiles.is_there(), reason="needs AVX-512 VNNI")


@pytest.fixture
def tiles(monkeypatch):
    take(monkeypatch, int8.BLOCKS)


@needs_tiles
@geometries
@pytest.mark.parametrize("by_lines", [0, 1])
@pytest.mark.parametrize("bytes_", [1, int8_tiles.TASK_BYTES])
def test_weight_gradients_by_lines_and_by_images(geometry, by_lines, bytes_, monkeypatch):
    _, stride, *_ = geometry
    if by_lines and stride[0] > 1:
        pytest.skip("lines of the kernel see lines of the image that others do not")
    monkeypatch.setattr(int8_tiles, "TASK_BYTES", bytes_)  # one image at a time
    monkeypatch.setattr(int8_tiles_wgrad, "_prefers_lines", lambda *how: by_lines)
    a, w = operands(geometry)
    grads = [codes(*exact(a, w, geometry).shape, seed=seed) for seed in (2, 3)]
    found = int8_tiles_wgrad.conv_wgrad(
        [g.to(memory_format=LAST) for g in grads], a.to(memory_format=LAST), geometry[:4]
    )
    expected = sum(exact_wgrad(g, a, geometry) for g in grads).float()
    assert torch.equal(found, expected)


@needs_tiles
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("images", [1, 2, 7])
def test_images_are_divided_among_threads(threads, images, tiles, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for limit in (300, 1 << 18):
        monkeypatch.setattr(int8_tiles, "TASK_BYTES", limit)
        prepared_anew()
        geometry = *THREE, (images, 20, 6, 7), 35
        a, w = operands(geometry)
        product, scale = exact(a, w, geometry), torch.tensor(0.3)
        assert_exact(conv(a, w, geometry, scale), product, scale)
        g = codes(*product.shape, seed=2)
        assert torch.equal(int8.conv_wgrad([g], a, *THREE), exact_wgrad(g, a, geometry).float())


@needs_tiles
@pytest.mark.parametrize("channels", [1, 15, 16, 17, 31, 32, 33, 48, 49, 64, 65])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_channels_and_nothing_beside_them(channels, dtype, tiles):
    # The rest of a vector must not be written: the next pixel's channels lie there, and after the last one nothing of
    # ours does.
    for rows in (1, 11, 12, 13, 14, 15, 29):
        geometry = *POINTWISE, (rows, 5, 1, 1), channels
        a, w = operands(geometry)
        product, scale = exact(a, w, geometry), torch.tensor(0.3)
        assert_exact(conv(a, w, geometry, scale, dtype), product, scale, dtype)
        memory = torch.full((rows * channels + 64,), 7, dtype=dtype)
        out = memory[: rows * channels].view(rows, channels, 1, 1)
        int8_tiles.conv(a, w, scale, POINTWISE, True, out)
        assert torch.equal(out, (product.float() * scale).to(dtype))
        assert torch.equal(memory[rows * channels :], torch.full((64,), 7, dtype=dtype))


@needs_tiles
@pytest.mark.parametrize(("low", "high"), [(-128, -128), (127, -128), (-128, 127)])
def test_the_largest_sums(low, high, tiles):
    # As long as is allowed, of the codes with the largest products, which the shift makes larger still.
    longest = int8_tiles.MOST_TERMS
    a, w = torch.full((1, longest, 1, 1), low).char(), torch.full((2, longest, 1, 1), high).char()
    geometry = *POINTWISE, tuple(a.shape), 2
    assert_exact(conv(a, w, geometry, torch.tensor(1.0)), exact(a, w, geometry), 1.0)
    # Images of which some thread would get two, and gradients of which one image has two, were too many for int32.
    for images, pixels, count in ((3, longest * 2 // 3, 1), (2, longest // 2, 2), (2, longest, 1), (1, longest, 2)):
        a, g = torch.full((images, 1, 1, pixels), low).char(), torch.full((images, 1, 1, pixels), high).char()
        found = int8.conv_wgrad([g] * count, a, *POINTWISE)
        assert found.item() == float(count * low * high * a.numel())


@needs_tiles
def test_long_sums_of_any_codes(tiles):
    geometry = *POINTWISE, (3, int8_tiles.MOST_TERMS, 1, 1), 5
    a, w = codes(*geometry[4], low=-128), codes(5, int8_tiles.MOST_TERMS, 1, 1, low=-128, seed=1)
    assert_exact(conv(a, w, geometry, torch.tensor(1.0)), exact(a, w, geometry), 1.0)


def test_where_blocks_serve(monkeypatch):
    monkeypatch.setattr(int8_tiles, "is_there", lambda: True)
    longest = int8_tiles.MOST_TERMS

    assert int8_tiles.suits((1, longest, 1, 1), POINTWISE, (1, 1))
    assert not int8_tiles.suits((1, longest + 1, 1, 1), POINTWISE, (1, 1))
    assert not int8_tiles.suits((1, 0, 1, 1), POINTWISE, (1, 1))
    assert not int8_tiles.suits((1, 8, 9, 9), (*THREE[:3], (1, 2)), (7, 7))  # taps that are no neighbours
    assert int8_tiles.suits((1, 8, 9, 9), ((3, 1), *THREE[1:3], (2, 2)), (7, 7))
    # What a stride leaves out lies between what is read: offsets would leave int32.
    assert not int8_tiles.suits((1, 1, 32768, 65544), ((1, 1), (1, 65543), (0, 0), (1, 1)), (32768, 2))
    assert int8_tiles.suits_dgrad((1, 8, 4, 4), THREE, (1, 8, 4, 4))
    assert not int8_tiles.suits_dgrad((1, 8, 4, 4), (*THREE[:3], (2, 2)), (1, 8, 6, 6))
    assert int8_tiles.suits_dgrad((1, 8, 4, 4), (*THREE[:3], (2, 1)), (1, 8, 6, 4))
    assert int8_tiles.suits_dgrad((1, 8, 4, 4), ((3, 1), *THREE[1:3], (2, 2)), (1, 8, 6, 2))
    assert not int8_tiles.suits_dgrad((1, 8, 4, 4), (*THREE[:1], (2, 1), (1, 1), (2, 1)), (1, 8, 9, 4))
    assert not int8_tiles.suits_dgrad((1, 1, 1, 1), ((1, 1), (65543, 65543), (0, 0), (1, 1)), (1, 1, 1, 1 << 29))
    a, g = (1, 8, 4, 4), (1, 2, 4, 4)
    assert int8_tiles_wgrad.suits(g, 1, a, (3, 3))
    assert not int8_tiles_wgrad.suits((1, 2, 3, 1), 1, a, (3, 3))
    assert not int8_tiles_wgrad.suits((1, 1, longest // 2 + 1, 1), 2, a, (3, 3))
    assert not int8_tiles_wgrad.suits(g, 1, (1, int8_tiles_wgrad.MOST_TAPS // 9 + 1, 4, 4), (3, 3))
    assert not int8_tiles_wgrad.suits((1, 1, 250, 250), 1, (1, 1, 300, 300), (64, 64))  # quads for each tap
    assert not int8_tiles_wgrad.suits((256, 512, 256, 256), 1, (256, 256, 256, 256), (3, 3))  # sums of tasks
    monkeypatch.setattr(int8_tiles, "is_there", lambda: False)
    assert not int8_tiles.suits((1, 8, 4, 4), THREE, (4, 4))
    assert not int8_tiles.suits_dgrad((1, 8, 4, 4), THREE, (1, 8, 4, 4))
    assert not int8_tiles_wgrad.suits(g, 1, a, (3, 3))


@pytest.mark.parametrize(("features", "there"), [("+avx512f,+avx512vnni", True), ("+avx512f,-avx512vnni", False)])
def test_the_instruction_is_that_of_the_cpu_which_numba_compiles_for(features, there, monkeypatch):
    monkeypatch.setattr(of_numba, "compiled_for", lambda: ("name", features))
    assert int8_tiles.is_there.__wrapped__() is there


@pytest.fixture
def chosen(monkeypatch):
    """What was chosen, by key: nothing as yet."""
    found = {}
    monkeypatch.setattr(routes, "_chosen", found)
    return found


@needs_tiles
def test_the_first_calls_of_a_size_choose(chosen):
    # Of a linear layer, of which batches have any number of rows; and of images.
    for rows, kinds in ((33, 1), (40, 1), (63, 1), (64, 2)):
        geometry = *POINTWISE, (rows, 24, 1, 1), 10
        a, w = operands(geometry)
        assert_exact(conv(a, w, geometry, torch.tensor(0.3)), exact(a, w, geometry), torch.tensor(0.3))
        assert len(chosen) == kinds
    for size, kinds in (((2, 8, 6, 7), 3), ((3, 8, 5, 4), 3), ((4, 8, 6, 7), 4), ((2, 8, 8, 7), 5)):
        a, w = operands((*THREE, size, 8))
        conv(a, w, (*THREE, size, 8), torch.tensor(0.3))
        assert len(chosen) == kinds


@needs_tiles
@pytest.mark.parametrize("scale", [torch.nan, torch.inf])
def test_scales_that_make_nan_of_sums_take_no_way_away(chosen, scale):
    geometry = *THREE, (2, 8, 6, 7), 8
    a, w = operands(geometry)
    a[0] = 0
    for _ in range(2):
        assert_exact(conv(a, w, geometry, torch.tensor(scale)), exact(a, w, geometry), torch.tensor(scale))
    assert len(chosen) == 1


@needs_tiles
def test_nothing_is_chosen_where_nothing_is_computed(chosen):
    geometry = *THREE, (2, 8, 6, 7), 8
    a, w = operands(geometry)
    with driver.rehearsal() as versions:
        conv(a, w, geometry, torch.tensor(0.3))
        int8.conv_wgrad([codes(2, 8, 6, 7)], a, *THREE)
    assert not chosen
    assert {"patches", "convolve", "convolve_for_weight"} <= {version.driver.__name__ for version in versions}


GROUPS = {
    "a vector each": (4, 16, 16, 4),
    "two vectors each": (3, 32, 48, 3),
    "two fill a vector": (4, 8, 8, 2),
    "depthwise": (32, 1, 1, 2),
    "none fills a vector": (3, 8, 16, 1),
    "outputs fill none": (2, 16, 24, 1),
    "odd": (2, 3, 5, 1),
}


@needs_tiles
@pytest.mark.parametrize(("groups", "inputs", "outputs", "parts"), GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("stride", [(1, 1), (2, 1), (3, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_groups(groups, inputs, outputs, parts, stride, dtype):
    assert int8_tiles.parts_of(groups, groups * inputs, groups * outputs) == parts
    assert int8_tiles.suits_groups(groups, groups * inputs, groups * outputs)
    a, w = codes(5, groups * inputs, 9, 8, low=-128), codes(groups * outputs, inputs, 3, 2, seed=1)
    how, scale, yes = (stride, (1, 0), (1, 1)), torch.tensor(0.3), torch.tensor(True)
    arguments = a, w, scale, *how, dtype, True, yes, groups
    found = int8.conv(*arguments)
    assert_identical(found, reference.int8_conv(*arguments))
    g = codes(*found.shape, seed=2)
    arguments = g, w, scale, a.shape, *how, dtype, True, yes, groups
    assert_identical(int8.conv_dgrad(*arguments), reference.int8_conv_dgrad(*arguments))
    for grads in ([g], [g, -g]):
        arguments = grads, a, (3, 2), *how, groups
        assert_identical(int8.conv_wgrad(*arguments), reference.int8_conv_wgrad(*arguments))


@needs_tiles
def test_too_many_groups_are_left_to_floating_point():
    most = int8_tiles.MOST_TOGETHER
    assert int8_tiles.suits_groups(2 * most, 2 * most, 2 * most)
    assert not int8_tiles.suits_groups(most + 1, most + 1, most + 1)  # as one, nearly all would be zeros
