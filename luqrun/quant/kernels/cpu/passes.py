"""A layer's forward or backward pass in one call of compiled code.

What Python does between loops takes several times as long as they do, where layers are small. The loops are those of
the layer's operators, told the same numbers: the bits are theirs.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from luqrun.quant import routes
from luqrun.quant.encoding import Encoding
from luqrun.quant.kernels.cpu import driver, int8_tiles, int8_tiles_wgrad, loops, pass_kinds, requests, sizes
from luqrun.quant.kernels.cpu.int8_direct import SHIFT
from luqrun.quant.kernels.cpu.int8_products import MOST_VIEWS, multiply, scratch
from luqrun.quant.kernels.cpu.int8_tiles import Pairs
from luqrun.quant.kernels.cpu.pass_kinds import Kind, Shapes
from luqrun.quant.kernels.cpu.prepared import Place, Prepared, Room
from luqrun.quant.kernels.layout import empty, in_channels_last, is_channels_last

MOST_BYTES = 1 << 24  # that a pass works in, which its thread holds on to


class Codes(NamedTuple):
    """Where an operand's int8 codes are, their scale (float32), whether any is negative (bool), and what is kept of
    codes that are not kept themselves, or 0."""

    codes: Place
    scale: Place
    signed: Place
    fields: Place | int

    @classmethod
    def of(cls, elements: int, how: Encoding, kept: Room, work: Room, packed: bool) -> Codes:
        fields = kept.take(how.form.field_bytes(elements)) if packed else 0
        return cls((work if packed else kept).take(elements), kept.take(4), kept.take(1), fields)

    def quantizing(
        self, x: Place, dtype: torch.dtype, elements: int, how: Encoding, known: Place | int, pixels: Sequence[int]
    ) -> driver.Loop:
        """known: the address of statistics, or 0; pixels: see layout.pixels_of."""
        results, layout = (0, self.scale, self.signed, 0, known), requests.layout_of(pixels, how)
        where = x, dtype, self.codes, self.fields, results, Place("stream"), layout, 0
        return requests.quantizing(elements, *where, how, torch.int8, *requests.of_range(how))

    def unpacking(self, elements: int, how: Encoding) -> list[driver.Loop]:
        if self.fields == 0:
            return []
        numbers = elements, self.fields, self.codes, self.signed, *requests.form_of(how.form, torch.int8)
        return [(loops.unpack, sizes.chunks(elements), elements, numbers)]


class LayerPass:
    """Both passes of the layers of a kind: see `layer_pass`.

    settled: whether it is the fastest way; None where that is not known yet.
    """

    def __init__(self, kind: Kind, shapes: Shapes):
        self.kind, self.shapes, self.dtype = kind, shapes, kind.x_dtype
        self.counts, threads = shapes.elements(), torch.get_num_threads()
        self.settled = True if max(self.counts) <= sizes.FEW and shapes.groups == 1 else None
        kept, work = Room("kept"), Room("work")
        of_x, of_w, _ = kind.encodings
        packed = [count > sizes.FEW for count in self.counts[:2]]
        x = Codes.of(self.counts[0], of_x, kept, work, packed[0] or shapes.adds_in_library())
        w = Codes.of(self.counts[1], of_w, kept, work, packed[1])
        self.codes = x, w
        self._prepare_forward(x, w, work, threads)
        self.kept, self.work = kept.bytes, work.bytes
        self._prepare_backward(x, w, threads)

    def _prepare_forward(self, x: Codes, w: Codes, work: Room, threads: int) -> None:
        kind, shapes, counts, half = self.kind, self.shapes, self.counts, requests.HALF[self.dtype]
        strides = int8_tiles.strides_of(shapes.w, shapes.groups)
        fprop = int8_tiles.convolution(shapes.a, strides, shapes.geometry, shapes.out, shapes.groups, threads)
        packed, (of_x, of_w, _) = work.take(fprop.packing.bytes), kind.encodings
        steps = [
            x.quantizing(Place("x"), kind.x_dtype, counts[0], of_x, Place("known"), requests.IN_ORDER),
            w.quantizing(Place("w"), kind.w_dtype, counts[1], of_w, 0, requests.IN_ORDER),
            *fprop.loops(x.codes, w.codes, packed, Place("out"), half, (SHIFT, x.signed), (x.scale, w.scale)),
        ]
        self.forward_loops = Prepared(steps, max(*counts, fprop.work))

    def _prepare_backward(self, x: Codes, w: Codes, threads: int) -> None:
        shapes, counts, half, work = self.shapes, self.counts, requests.HALF[self.dtype], Room("work")
        (of_x, of_w, of_g), geometry, groups = self.kind.encodings, shapes.geometry, shapes.groups
        images, channels, height, width = shapes.out
        # Of one channel or pixel both memory orders are the same.
        in_order = shapes.linear or 1 in (channels, height * width)
        pixels = requests.IN_ORDER if in_order else (images, height * width, channels)
        if shapes.adds_in_library():  # which takes them as matrices
            x, g_codes = x._replace(codes=Place("x codes")), Place("g codes")
        else:
            x, g_codes = x if x.fields == 0 else x._replace(codes=work.take(counts[0])), work.take(counts[2])
        w = w if w.fields == 0 else w._replace(codes=work.take(counts[1]))
        g = Codes(g_codes, work.take(4), work.take(1), 0)
        self.reaches_all, dgrads = int8_tiles.input_gradient(shapes.out, geometry, shapes.a, groups, threads)
        packed = work.take(max([0, *(each.packing.bytes for each in dgrads)]))
        steps = [g.quantizing(Place("g"), self.dtype, counts[2], of_g, Place("known"), pixels)]
        steps += x.unpacking(counts[0], of_x) + w.unpacking(counts[1], of_w)
        for each in dgrads:
            scales = g.scale, w.scale
            steps += each.loops(g.codes, w.codes, packed, Place("grad x"), half, (SHIFT, g.signed), scales)
        scales, most = (g.scale, x.scale), max(*counts, *(each.work for each in dgrads))
        if shapes.adds_in_library():
            numbers = counts[1], Place("sums"), Place("grad w"), 0, *scales
            self.rescaling = Prepared([(loops.rescale, sizes.chunks(counts[1]), counts[1], numbers)], counts[1])
        else:
            wgrad = int8_tiles_wgrad.weight_gradient(*shapes.for_wgrad(), 1, geometry, groups, threads)
            sums = work.take(4 * math.prod(wgrad.sums))
            steps += wgrad.loops(x.codes, [g.codes], sums, Place("grad w"), counts[1], scales)
            most = max(most, wgrad.work)
        self.backward_loops, self.backward_work = Prepared(steps, most), work.bytes

    def with_threads_of_now(self) -> LayerPass | None:
        """This one, or the one that keeps the same where the number of threads has changed since; None where there is
        none."""
        return _of_now(self.kind)

    def is_fastest(self) -> bool:
        if self.settled is None:
            self.settled = self.shapes.are_fastest(self.dtype)
        return bool(self.settled)

    def forward(self, x: Tensor, w: Tensor, known: Tensor | None, stream: Tensor) -> tuple[Tensor, Tensor]:
        """(the layer's result, what `backward` takes). known: statistics of x, or None."""
        kept = torch.empty(self.kept, dtype=torch.uint8, device="cpu")
        if self.shapes.linear:
            out = torch.empty((*x.shape[:-1], w.shape[0]), dtype=self.dtype, device="cpu")
        else:
            out = empty(self.shapes.out, True, self.dtype, x.device)
        work = scratch("pass", 1, self.work, torch.int8)
        tensors = {"x": x, "w": w, "out": out, "kept": kept, "work": work, "known": known, "stream": stream}
        self.forward_loops.run(_addresses(tensors))
        return out, kept

    def tensors(self, kept: Tensor) -> tuple[Tensor, ...]:
        """What a layer keeps that calls its operators one by one (operands.Stored), as views: of x, then of w."""
        found = []
        for codes, count, how in zip(self.codes, self.counts, self.kind.encodings, strict=False):
            if codes.fields == 0:
                found.append(_piece(kept, codes.codes, count).view(torch.int8))
            else:
                found.append(_piece(kept, codes.fields, how.form.field_bytes(count)))
            found.append(_piece(kept, codes.scale, 4).view(torch.float32).squeeze(0))
            found.append(_piece(kept, codes.signed, 1).view(torch.bool).squeeze(0))
        return tuple(found)

    def backward(
        self, g: Tensor, kept: Tensor, shape: Sequence[int], known: Tensor | None, stream: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The gradients of x, of this shape, and of w (float32): of a convolution in channels_last memory. known:
        statistics of g, or None."""
        assert g.dtype == self.dtype
        g = g.contiguous() if self.shapes.linear else in_channels_last(g)
        if self.shapes.linear:
            grad_x = torch.empty(shape, dtype=self.dtype, device="cpu")
            grad_w = torch.empty(self.kind.w, dtype=torch.float32, device="cpu")
        else:
            grad_x = empty(shape, True, self.dtype, g.device)
            grad_w = empty(self.kind.w, True, torch.float32, g.device)
        if not self.reaches_all:
            grad_x.zero_()
        tensors = {"g": g, "grad x": grad_x, "grad w": grad_w, "kept": kept, "known": known, "stream": stream}
        tensors["work"] = scratch("pass", 1, self.backward_work, torch.int8)
        if not self.shapes.adds_in_library():
            self.backward_loops.run(_addresses(tensors))
            return grad_x, grad_w
        (rows, inputs, *_), outputs = self.shapes.a, self.shapes.w[0]
        codes = scratch("codes of x", rows, inputs, torch.int8), scratch("codes of g", rows, outputs, torch.int8)
        tensors["x codes"], tensors["g codes"] = codes
        self.backward_loops.run(_addresses(tensors))
        tensors["sums"] = multiply(codes[1].t(), codes[0], scratch("products", outputs, inputs, torch.int32))
        self.rescaling.run(_addresses(tensors))
        return grad_x, grad_w


def _piece(memory: Tensor, place: Place, size: int) -> Tensor:
    return memory[place.offset : place.offset + size]


def _addresses(tensors: dict[str, Tensor | None]) -> dict[str, int]:
    return {name: 0 if x is None else x.data_ptr() for name, x in tensors.items()}


def layer_pass(
    x: Tensor,
    w: Tensor,
    geometry: Pairs | None,
    groups: int,
    encodings: tuple[Encoding, Encoding, Encoding],
    only_small: bool,
) -> LayerPass | None:
    """What makes the passes of a layer in one call each; None where that is not for it, or not known to be faster.

    x, w: float32 or bf16, of a linear layer or (with a geometry: stride, padding, dilation) a convolution. encodings:
    of x, w and the gradient of the result: one scale a tensor, and for x and w no draws.
    """
    if x.dtype not in requests.HALF or w.dtype not in requests.HALF or max(x.numel(), w.numel()) > pass_kinds.MOST:
        return None
    if geometry is None:
        fits = x.is_contiguous() and w.is_contiguous() and x.shape[-1] == w.shape[1]
    else:
        last = torch.channels_last
        fits = x.dim() == 4 and x.shape[1] == w.shape[1] * groups and (is_channels_last(x) or is_channels_last(w))
        fits = fits and x.is_contiguous(memory_format=last) and w.is_contiguous(memory_format=last)
    if not fits:
        return None
    kind = Kind(x.shape, x.dtype, w.shape, w.dtype, geometry, groups, encodings)
    if routes.rehearses():
        _made.__wrapped__(kind)  # for its loops
        return None
    found = _of_now(kind)
    if found is None or (only_small and max(found.counts) > sizes.FEW):
        return None
    return found if found.is_fastest() else None


def _of_now(kind: Kind) -> LayerPass | None:
    return _made(kind, torch.get_num_threads(), driver.threads_for(sys.maxsize))


@functools.lru_cache(MOST_VIEWS)
def _made(kind: Kind, *threads: int) -> LayerPass | None:
    """threads: torch's, and the loops', that images are divided among."""
    kind = kind._replace(x=tuple(kind.x), w=tuple(kind.w))
    shapes = Shapes.of(kind)
    made = LayerPass(kind, shapes) if shapes.suits() else None
    return made if made is not None and max(made.work, made.backward_work) <= MOST_BYTES else None
