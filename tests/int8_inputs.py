"""Geometries and codes of convolutions, and the same in int64, for the tests of the int8 GEMMs."""

import torch
import torch.nn.functional as F

from luqrun.quant.kernels.cpu import int8, int8_library, int8_tiles, int8_tiles_wgrad, passes

# kernel, stride, padding, dilation; then a size of the input, batch first, and the output channels
GEOMETRIES = {
    "pointwise": ((1, 1), (1, 1), (0, 0), (1, 1), (3, 8, 5, 6), 16),
    "pointwise, few channels": ((1, 1), (1, 1), (0, 0), (1, 1), (3, 3, 5, 6), 5),
    "pointwise, strided": ((1, 1), (2, 2), (0, 0), (1, 1), (2, 8, 7, 6), 4),
    "pointwise, padded": ((1, 1), (1, 1), (1, 1), (1, 1), (2, 8, 4, 4), 4),
    "pointwise, cut": ((1, 1), (1, 1), (-1, -1), (1, 1), (2, 8, 5, 5), 4),
    "rows": ((1, 1), (1, 1), (0, 0), (1, 1), (37, 24, 1, 1), 10),
    "3 x 3": ((3, 3), (1, 1), (1, 1), (1, 1), (3, 8, 6, 7), 8),
    "3 x 3, odd channels": ((3, 3), (1, 1), (1, 1), (1, 1), (2, 5, 6, 7), 3),
    "3 x 3, twelve channels": ((3, 3), (1, 1), (0, 0), (1, 1), (2, 12, 6, 7), 1),
    "3 x 3, one channel": ((3, 3), (1, 1), (1, 1), (1, 1), (2, 1, 6, 7), 4),
    "strided": ((3, 3), (2, 2), (1, 1), (1, 1), (2, 16, 8, 9), 8),
    "stride leaves pixels over": ((2, 2), (3, 3), (0, 0), (1, 1), (2, 3, 7, 9), 5),
    "stem": ((7, 7), (2, 2), (3, 3), (1, 1), (2, 3, 15, 16), 8),
    "tall": ((5, 1), (1, 1), (2, 0), (1, 1), (2, 8, 9, 4), 3),
    "wide": ((1, 7), (1, 2), (0, 3), (1, 1), (2, 3, 4, 12), 8),
    "dilated": ((3, 3), (1, 1), (2, 2), (2, 2), (2, 8, 7, 8), 4),
    "uneven": ((3, 2), (1, 2), (2, 0), (1, 3), (2, 4, 9, 10), 6),
    "much padding": ((2, 3), (2, 1), (3, 4), (1, 1), (1, 8, 3, 2), 4),
    "larger than the image": ((5, 5), (1, 1), (2, 2), (1, 1), (2, 8, 2, 3), 4),
    "cut": ((3, 3), (1, 1), (-1, -2), (1, 1), (2, 8, 8, 9), 4),
    "patches, one pixel": ((3, 3), (1, 1), (0, 0), (1, 1), (2, 8, 3, 3), 4),
}


def codes(*shape, low=-127, high=127, seed=0):
    return torch.randint(low, high + 1, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(seed))


def cropped(a, padding):
    """a without what a negative padding cuts off, and the padding that is left."""
    cut = [max(-size, 0) for size in padding]
    return a[:, :, cut[0] : a.shape[2] - cut[0], cut[1] : a.shape[3] - cut[1]], [max(size, 0) for size in padding]


def exact(a, w, geometry):
    """The convolution in int64."""
    _, stride, padding, dilation, *_ = geometry
    a, padding = cropped(a.long(), padding)
    return F.conv2d(a, w.long(), None, stride, padding, dilation)


def exact_wgrad(g, a, geometry):
    """The weight gradient in int64: the convolution of a with g, images for channels and dilation for stride."""
    kernel, stride, padding, dilation, *_ = geometry
    a, padding = cropped(a.long(), padding)
    full = F.conv2d(a.transpose(0, 1), g.long().transpose(0, 1), None, dilation, padding, stride)
    return full[:, :, : kernel[0], : kernel[1]].transpose(0, 1)


def operands(geometry, low=-127, largest=7):
    """Activations of low..127 and a weight of -largest..largest."""
    kernel, _, _, _, size, channels = geometry
    return codes(*size, low=low), codes(channels, size[1], *kernel, low=-largest, high=largest, seed=1)


def for_onednn(geometry):
    """Whether the direct convolution is asked for these: not for what it may do outside its memory."""
    kernel, stride, _, dilation, *_ = geometry
    return dilation == (1, 1) and stride[0] <= kernel[0] and stride[1] <= kernel[1] and int8_library.has_direct_conv()


def conv(a, w, geometry, scale, dtype=torch.float32, channels_last=False, signed=True):
    _, stride, padding, dilation, *_ = geometry
    return int8.conv(a, w, scale, stride, padding, dilation, dtype, channels_last, torch.tensor(signed))


def prepared_anew():
    """Forget what was prepared for the shapes that came: a test has changed what it follows from."""
    tiles = int8_tiles.convolution, int8_tiles.input_gradient, int8_tiles_wgrad.weight_gradient
    for each in (int8._fprop, int8._dgrad, int8._wgrad, *tiles, passes._made):
        each.cache_clear()


def assert_exact(found, product, scale, dtype=torch.float32):
    """found is scale * product, rounded in float32 and then to dtype."""
    expected = (product.float() * scale).to(dtype)
    assert found.dtype == dtype
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def results_of(monkeypatch, name):
    """A list of what the function of int8_library returned, which grows with each call."""
    results, function = [], getattr(int8_library, name)

    def call(*arguments):
        results.append(function(*arguments))
        return results[-1]

    monkeypatch.setattr(int8_library, name, call)
    return results


def take(monkeypatch, way):
    """Let the int8 GEMMs be made by the libraries, or where it can by one of our own ways, untimed."""

    def taken(gemm, x, geometry, groups, rest, ours, library):
        result = ours.get(way, library)()
        return library() if result is None else result

    monkeypatch.setattr(int8, "_by_the_fastest", taken)
