"""3x3 convolutions on int8 codes by Winograd's tiles: 16 products for a tile's four outputs where others take 36.

In floating point that is another number than the convolution's. On integers it is exact, if what the transforms make
fits: that of INT4 weights does, and what of an image's does not is added to the sums number by number. That happens to
gradients of which neighbours are near the maximum, which are few; where they are many, and where a weight does not fit,
the work is refused.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from luqrun.quant import routes
from luqrun.quant.kernels.cpu import int8_tiles
from luqrun.quant.kernels.cpu.int8_products import scratch
from luqrun.quant.kernels.cpu.int8_tiles import PRODUCTS, Packing, driver, weight_loops
from luqrun.quant.kernels.cpu.sizes import APART, COLUMNS, LANES, ROWS
from luqrun.quant.kernels.layout import empty

THREE, ONE = (3, 3), (1, 1)
FEWEST_PRODUCTS = 1 << 25  # for each tap: with fewer, compiling takes longer than is gained
MOST_CHANNELS = (1 << 31) // (4 * 9 * 128 * 128)  # of which int32 holds four times the sums, whatever the codes
MOST_TILES = (1 << 31) // (4 * 4 * 128 * 128) - 4  # of a weight gradient at a time: for the same reason
POINT_BYTES = 3 << 17  # of transformed tiles at a time, so that they stay in the cache
SCARCE = 64  # at most one in so many numbers may be left out of the transformed tiles, to be added by itself
# Bytes of both operands of a weight gradient at a time, so that they stay in the cache: least, most, and between them
# so many for each of its elements, to which is added at the end.
CHUNK_BYTES, CHUNK_SUMS = (1 << 21, 1 << 23), 128
TASKS = 4  # for each thread, where there are tiles for as many


@functools.cache
def _loops() -> ModuleType:
    from luqrun.quant.kernels.cpu import winograd_loops  # compiled code is loaded when it is first needed

    return winograd_loops


@functools.cache
def _wgrad_loops() -> ModuleType:
    from luqrun.quant.kernels.cpu import winograd_wgrad_loops

    return winograd_wgrad_loops


def suits(geometry: Sequence, inputs: int, outputs: int, pixels: int) -> bool:
    """Whether a convolution (kernel, stride, padding, dilation) of so many channels to so many, and pixels in all
    images, can be made of tiles, and is large enough to gain by it."""
    kernel, stride, _, dilation = geometry
    if kernel != THREE or stride != ONE or dilation != ONE:
        return False
    fits = inputs % LANES == outputs % LANES == 0 < inputs <= MOST_CHANNELS
    # A rehearsal is of small images, for all that may come.
    pays = routes.rehearses() or pixels * inputs * outputs >= FEWEST_PRODUCTS
    return fits and pays and int8_tiles.is_there()


def _transformed(packing: Packing, first: int, inputs: int, outputs: int) -> tuple[Tensor, Tensor] | None:
    """The right operand of the loops, and its shifts; None where it does not fit int8. first: the address of what of
    the weight is packed first."""
    panels = -(-outputs // COLUMNS)
    weight = scratch("tiles of weights", 16 * inputs, outputs, torch.int8)
    shifts = torch.empty(4 * outputs, dtype=torch.int32, device="cpu")
    wrong = torch.zeros(panels, dtype=torch.uint8, device="cpu")
    packed = packing.scratch()
    numbers = packed, weight.data_ptr(), shifts.data_ptr(), wrong.data_ptr(), inputs, outputs
    driver().in_turn(packing.loop(first, packed), (weight_loops().transform_weight, panels, weight.numel(), numbers))
    return None if wrong.any() else (weight, shifts)


def conv(a: Tensor, w: Tensor, scale: Tensor, padding: Sequence[int], out: Tensor, adjoint: bool = False) -> bool:
    """Fill `out` as int8.conv says, or return False where it is refused. All channels_last. adjoint: with the kernel
    turned round, from its outputs to its inputs."""
    (images, inputs, height, width), (_, outputs, out_height, out_width) = a.shape, out.shape
    if adjoint:
        begin, strides = 8 * outputs, (-3 * outputs, -outputs, 9 * outputs, 1, 0)
    else:
        begin, strides = 0, (3 * inputs, inputs, 1, 9 * inputs, 0)
    packing = Packing.of(1, 1, outputs, (3, 3, inputs), strides)
    transformed = _transformed(packing, w.data_ptr() + begin, inputs, outputs)
    if transformed is None:
        return False
    weight, shifts = transformed
    of_image = -(-out_height // 2) * -(-out_width // 2)
    most = max(ROWS[2], POINT_BYTES // (16 * inputs * ROWS[2]) * ROWS[2])
    of_thread = -(-images // torch.get_num_threads())
    group = -(-of_thread // (TASKS if of_thread * of_image >= TASKS * most else 1))
    tasks = -(-images // group)
    refused = torch.zeros(tasks, dtype=torch.uint8, device="cpu")
    address = a.data_ptr(), weight.data_ptr(), shifts.data_ptr(), out.data_ptr()
    how = int(out.dtype == torch.bfloat16), scale.data_ptr(), group, most, refused.data_ptr(), SCARCE
    size = images, height, width, inputs, *padding, out_height, out_width, outputs
    work = images * of_image * 16 * inputs * outputs // PRODUCTS
    _loops().convolve_points(tasks, work, *address, *how, *size)
    return not refused.any()


class _Operand:
    """The transformed tiles of the images or gradients of a weight gradient, so many quads at a time, and what is noted
    of them: winograd_wgrad_loops says what the numbers are.

    side: of a tile's square; panel: channels of a panel.
    """

    def __init__(self, x: Tensor, side: int, panel: int, padding: Sequence[int], quads: int):
        self.channels, self.how = x.shape[1], (panel, side)
        self.size = x.shape[0], x.shape[2], x.shape[3], x.shape[1], *padding
        self.far = 4 * quads * self.channels + APART  # bytes from point to point
        self.tasks = min(TASKS * torch.get_num_threads(), quads)
        self.step = -(-quads // self.tasks)
        # Notes of a task: none of images, for which int8 must do.
        self.most = 0 if side == 4 else max(1, quads * 64 * self.channels // (SCARCE * self.tasks))
        self.out = scratch(f"tiles of {side}", 16, self.far, torch.uint8)
        self.notes = scratch("notes", self.tasks * self.most, 4, torch.int32)
        self.found = torch.zeros(self.tasks, dtype=torch.int64, device="cpu")

    def transform(self, x: Tensor, begin: int, tiles: int, tiled: Sequence[int]) -> bool:
        """Of so many tiles of x; whether they fit."""
        quads, notes = -(-tiles // 4), (self.notes.data_ptr(), self.most, self.found.data_ptr())
        where = x.data_ptr(), self.out.data_ptr(), self.far, begin, tiles, quads, *self.how, self.step
        tasks, work = -(-quads // self.step), 4 * tiles * self.channels
        self.found.zero_()  # of tasks that have nothing to do, too
        _wgrad_loops().transform(tasks, work, *where, *notes, *self.size, *tiled)
        return not (self.found < 0).any()


def conv_wgrad(grads: Sequence[Tensor], a: Tensor, padding: Sequence[int]) -> Tensor | None:
    """See int8.conv_wgrad, or None where it is refused. All channels_last."""
    (images, outputs, height, width), inputs, threads = grads[0].shape, a.shape[1], torch.get_num_threads()
    tiled = -(-height // 2), -(-width // 2)
    tiles = images * tiled[0] * tiled[1]
    chunk = min(max(CHUNK_SUMS * inputs * outputs, CHUNK_BYTES[0]), CHUNK_BYTES[1])
    quads = min(-(-tiles // 4), max(1, chunk // (64 * (inputs + outputs))), MOST_TILES // 4)
    left, right = _Operand(grads[0], 2, outputs, (0, 0), quads), _Operand(a, 4, COLUMNS, padding, quads)
    out = empty((outputs, inputs, *THREE), True, torch.float32, a.device)
    parts = outputs if tiles > 4 * quads or len(grads) > 1 else 0
    total = scratch("sums of weight gradients", parts, 9 * inputs, torch.float64)
    panels = -(-inputs // COLUMNS)
    splits = min(-(-threads // panels), outputs // LANES)
    for begin in range(0, tiles, 4 * quads):
        count = min(4 * quads, tiles - begin)
        if not right.transform(a, begin, count, tiled):
            return None
        for number, g in enumerate(grads):
            if not left.transform(g, begin, count, tiled):
                return None
            operands = left.out.data_ptr(), left.far, right.out.data_ptr(), right.far, -(-count // 4)
            notes = left.notes.data_ptr(), left.most, left.found.data_ptr(), left.tasks
            add, last = begin + number > 0, begin + count == tiles and number == len(grads) - 1
            where, work = (out.data_ptr(), total.data_ptr()), 16 * count * inputs * outputs // PRODUCTS
            how = int(add), int(last), splits, inputs, outputs
            _wgrad_loops().multiply_points(panels * splits, work, *operands, *notes, *where, *how)
    return out
