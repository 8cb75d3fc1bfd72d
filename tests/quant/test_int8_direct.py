"""When oneDNN's convolution is taken for int8 codes, and in which pieces."""

import pytest
import torch
from int8_inputs import GEOMETRIES, assert_exact, codes, conv, exact, operands, results_of, take

from luqrun.quant.kernels.cpu import int8, int8_direct, int8_library, int8_products


@pytest.fixture(autouse=True)
def libraries(monkeypatch):
    take(monkeypatch, "libraries")


@pytest.mark.parametrize("name", ["pointwise", "3 x 3", "strided", "stem"])
@pytest.mark.parametrize("amx", [False, True])
def test_the_direct_convolution_is_taken_where_patches_are_large(name, amx, monkeypatch):
    geometry, used = GEOMETRIES[name], []
    monkeypatch.setattr(int8_library, "_conv_directly", lambda *arguments: used.append(1) or True)
    monkeypatch.setattr(int8_library, "has_direct_conv", lambda: True)
    monkeypatch.setattr(int8_library, "has_amx", lambda: amx)
    a, w = operands(geometry)
    pixels = exact(a, w, geometry)[:, 0].numel()
    limit, size = ("DIRECT_PIXELS", pixels / len(w)) if amx else ("DIRECT_BYTES", pixels * w[0].numel() - 1)
    for at, direct in ((size, name != "pointwise"), (size + 1, False)):
        used.clear()
        monkeypatch.setattr(int8_library, limit, at)
        conv(a, w, geometry, torch.tensor(1.0))
        assert bool(used) == direct


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("largest", [7, 14, 15, 28, 29, 127])
def test_deep_direct_convolutions(largest, signed, monkeypatch):
    # oneDNN returns float32: 9 * 512 * 255 * 14 of shifted codes is below 2^24, and not 15; of unsigned ones 28.
    taken = results_of(monkeypatch, "_conv_directly")
    monkeypatch.setattr(int8_library, "prefers_direct", lambda patches, channels: True)
    geometry = (3, 3), (1, 1), (1, 1), (1, 1), (2, 512, 4, 4), 2
    a, w = codes(2, 512, 4, 4), codes(2, 512, 3, 3, low=largest - largest // 4, high=largest, seed=1)
    w[0, 0, 0, 0] = largest
    a = a if signed else (a.abs() | 64)  # sums near 2^24, and beyond
    for scale in (0.3, 1.0, 0.0137):
        scale = torch.tensor(scale)
        assert_exact(conv(a, w, geometry, scale, signed=signed), exact(a, w, geometry), scale)
    assert taken == [largest <= (14 if signed else 28)] * 3 or not int8_library.has_direct_conv()


def test_images_in_blocks_of_two_kinds(monkeypatch):
    monkeypatch.setattr(int8_library, "prefers_direct", lambda patches, channels: True)
    image = 8 * 8 * 4 + 4 * 6 * 6 * 3  # bytes of one, padded, and of its sums
    monkeypatch.setattr(int8_direct, "BLOCK_BYTES", -(-2 * image // torch.get_num_threads()))
    taken = results_of(monkeypatch, "_conv_directly")
    geometry = (3, 3), (1, 1), (1, 1), (1, 1), (7, 4, 6, 6), 3
    a, w = operands(geometry)
    parts = int8_direct.blocks(a.shape, (6, 6), 3, geometry, 7)
    assert [first for first, _ in parts] == [0, 2, 4, 6]
    assert [kind.images for _, kind in parts] == [2, 2, 2, 1]
    for dtype in (torch.float32, torch.bfloat16):
        assert_exact(conv(a, w, geometry, torch.tensor(0.3), dtype), exact(a, w, geometry), torch.tensor(0.3), dtype)
    assert taken == [True] * 2 or not int8_library.has_direct_conv()


def test_what_it_may_write_outside_its_memory_for_is_not_asked(monkeypatch):
    asked = []
    monkeypatch.setattr(int8_direct, "pack", lambda *how: asked.append(how) or pytest.fail("oneDNN was asked"))
    monkeypatch.setattr(int8_library, "prefers_direct", lambda patches, channels: True)
    monkeypatch.setattr(int8_library, "has_direct_conv", lambda: True)
    for name in ("dilated", "uneven", "stride leaves pixels over", "pointwise, strided"):
        a, w = operands(GEOMETRIES[name])
        assert_exact(conv(a, w, GEOMETRIES[name], torch.tensor(1.0)), exact(a, w, GEOMETRIES[name]), 1.0)


@pytest.mark.parametrize("padding", [(0, 0), (2, 1), (-1, 2), (1, -2), (-3, -3), (9, 9)])
@pytest.mark.parametrize("shift", [0, 128])
def test_padded_codes(padding, shift):
    codes_in, size = codes(2, 5, 6, 3, low=-128), (2, 5, 6, 3)
    out = torch.full((2, max(5 + 2 * padding[0], 1), max(6 + 2 * padding[1], 1), 3), 7, dtype=torch.uint8)
    address = out.data_ptr(), codes_in.data_ptr()
    lines = out.shape[0] * out.shape[1]
    int8_library._loops().pad(lines, out.numel(), *address, shift, *size, *padding, *out.shape[1:3])
    unsigned = (codes_in.view(torch.uint8) ^ shift).int().permute(0, 3, 1, 2)
    around = (padding[1], out.shape[2] - 6 - padding[1], padding[0], out.shape[1] - 5 - padding[0])
    expected = torch.nn.functional.pad(unsigned, around, value=shift)
    assert torch.equal(out.int().permute(0, 3, 1, 2), expected)


@pytest.fixture(params=[False, True], ids=["patches", "direct"])
def route_of_new_memory(request, monkeypatch):
    monkeypatch.setattr(int8_library, "prefers_direct", lambda patches, channels: request.param)
    monkeypatch.setattr(int8_products, "_memory", int8_products._Memory())
    int8_direct._ones_and_zeros.cache_clear()


def test_scratch_memory_outlives_the_mode_it_was_made_in(route_of_new_memory):
    a, w = operands(GEOMETRIES["3 x 3"])
    scale, expected = torch.tensor(0.5), exact(a, w, GEOMETRIES["3 x 3"])
    with torch.inference_mode():
        assert_exact(conv(a, w, GEOMETRIES["3 x 3"], scale), expected, scale)
    assert_exact(conv(a, w, GEOMETRIES["3 x 3"], scale), expected, scale)


def test_neither_the_default_device_nor_the_default_dtype_is_its_own(route_of_new_memory):
    a, w = operands(GEOMETRIES["3 x 3"])
    scale, expected = torch.tensor(0.5), exact(a, w, GEOMETRIES["3 x 3"])
    signed, before = torch.tensor(True), torch.get_default_dtype()
    how = (1, 1), (1, 1), (1, 1), torch.float32, False, signed
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            found = (
                int8_library._trial(int8_direct.Kind(1, 8, 9, 8, 8, (3, 3), (1, 1), 7, 1)),
                int8.conv(a, w, scale, *how),
            )
    finally:
        torch.set_default_dtype(before)
    assert found[0] or not int8_library.has_direct_conv()
    assert_exact(found[1], expected, scale)
