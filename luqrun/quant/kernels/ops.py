"""The kernels as operators of torch: torch.ops.luqrun.*, with the shapes that torch.compile needs.

Each runs on the backend that `backend_for` chooses for its tensor's device; see luqrun.quant.kernels.reference for what
each computes. They are opaque to the compiler and without gradients: luqrun.quant.function has the autograd Functions.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from luqrun.errors import TensorError
from luqrun.internals.of_torch import keep_results
from luqrun.quant.encoding import Encoding
from luqrun.quant.formats import Format, get_format
from luqrun.quant.kernels import (
    backend_for,
    block_kernels,
    blocks,
    has_kernels,
    reference,
    rotation_kernels,
)
from luqrun.quant.kernels.cpu import int8
from luqrun.quant.kernels.layout import dense, empty, is_channels_last
from luqrun.quant.kernels.operators import LIBRARY, operator
from luqrun.quant.kernels.philox import EVALUATION_STEP, MICRO_STEP, RANK, STEP
from luqrun.quant.scale_formats import dtype_of


def _backend(x: Tensor, form: Format, rounding: str = "nearest"):
    return backend_for(x.device.type) if has_kernels(form, rounding) else reference


def _coded(x: Tensor, encoding: str, dtype: torch.dtype, packed: bool) -> tuple[Tensor, Tensor]:
    """Codes and fields of x without data."""
    size = Encoding.of(encoding).form.field_bytes(x.numel()) if packed else 0
    return torch.empty_like(dense(x), dtype=dtype), x.new_empty(size, dtype=torch.uint8)


@functools.cache
def a_micro_step(device: torch.device) -> Tensor:
    """What leads from the names of a forward's draws to those of the next. Made once."""
    with torch.inference_mode(False):
        step = torch.zeros(6, dtype=torch.int64, device="cpu")
        step[MICRO_STEP] = 1
        return step.to(device)


@operator("next_draws(Tensor(a!) streams, bool advances, bool evaluates, int rank, int redraw_every) -> Tensor")
class next_draws:
    """The names of a forward's draws: int64 (3, 6), see quant.draws. An operator, for a compiler may neither read the
    names of a draw after they advanced nor run this twice.

    advances: the next forward gets other names. evaluates: the names are those of every evaluation. rank: of this
    process, in the names of what is its own: activations and gradients, not weights. redraw_every: see Quantizer.
    """

    def run(streams, advances, evaluates, rank, redraw_every):
        names = streams.clone()
        if evaluates:
            names[:, STEP].fill_(EVALUATION_STEP)
            names[:, MICRO_STEP].zero_()
            return names
        if rank:
            names[1:, RANK].fill_(rank)
        if redraw_every > 1:
            names[2, STEP : MICRO_STEP + 1].div_(redraw_every, rounding_mode="floor")
        if advances:
            streams.add_(a_micro_step(streams.device))
        return names

    def fake(streams, advances, evaluates, rank, redraw_every):
        return torch.empty_like(streams)


# Compiled, activation checkpointing would read the names again in the backward pass, after they advanced.
keep_results("luqrun::next_draws", LIBRARY)


@operator("statistics(Tensor x, bool moments, Tensor? unless=None) -> Tensor")
class statistics:
    def run(x, moments, unless=None):
        return backend_for(x.device.type).statistics(x, moments, unless)

    def fake(x, moments, unless=None):
        return x.new_empty(4, dtype=torch.float64)


@operator(
    "encode(Tensor x, Tensor scale, Tensor signed, str encoding, Tensor stream, int sample, ScalarType dtype, "
    "bool packed=False, bool observe=False) -> (Tensor, Tensor, Tensor)"
)
class encode:
    """encoding: its `key`."""

    def run(x, scale, signed, encoding, stream, sample, dtype, packed=False, observe=False):
        how = Encoding.of(encoding)
        return _backend(x, how.form, how.rounding).encode(x, scale, signed, how, stream, sample, dtype, packed, observe)

    def fake(x, scale, signed, encoding, stream, sample, dtype, packed=False, observe=False):
        return *_coded(x, encoding, dtype, packed), x.new_empty(() if observe else 0, dtype=torch.float32)


@operator(
    "quantize(Tensor x, str encoding, Tensor? hindsight, Tensor stream, ScalarType dtype, bool packed, "
    "Tensor? known=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
class quantize:
    """Measure, scale and encode in one call; kernels that lack it (the reference's) leave it to Quantizer.run."""

    def run(x, encoding, hindsight, stream, dtype, packed, known=None):
        return backend_for(x.device.type).quantize(x, Encoding.of(encoding), hindsight, stream, dtype, packed, known)

    def fake(x, encoding, hindsight, stream, dtype, packed, known=None):
        codes, fields = _coded(x, encoding, dtype, packed)
        scale, signed, maximum = (x.new_empty((), dtype=t) for t in (torch.float32, torch.bool, torch.float32))
        return codes, scale, signed, fields, maximum


@operator(
    "unpack(Tensor fields, SymInt[] shape, bool channels_last, Tensor signed, str format, ScalarType dtype) -> Tensor"
)
class unpack:
    def run(fields, shape, channels_last, signed, format, dtype):
        form = get_format(format)
        return _backend(fields, form).unpack(fields, shape, channels_last, signed, form, dtype)

    def fake(fields, shape, channels_last, signed, format, dtype):
        return empty(shape, channels_last, dtype, fields.device)


@operator(
    "encode_blocks(Tensor x, str encoding, SymInt[] grid, int[] block, Tensor maximum, Tensor stream, int sample, "
    "ScalarType dtype, bool packed) -> (Tensor, Tensor, Tensor, Tensor)"
)
class encode_blocks:
    def run(x, encoding, grid, block, maximum, stream, sample, dtype, packed):
        how = Encoding.of(encoding)
        return block_kernels(x.device.type, how).encode_blocks(
            x, how, grid, tuple(block), maximum, stream, sample, dtype, packed
        )

    def fake(x, encoding, grid, block, maximum, stream, sample, dtype, packed):
        scales = math.prod(blocks.counts(grid, block))
        kind = dtype_of(Encoding.of(encoding).scale_format)
        return (
            *_coded(x, encoding, dtype, packed),
            x.new_empty(scales, dtype=kind),
            x.new_empty((), dtype=torch.float32),
        )


@operator(
    "decode_blocks(Tensor fields, Tensor scales, SymInt[] shape, bool channels_last, str encoding, SymInt[] grid, "
    "int[] block, ScalarType dtype) -> Tensor"
)
class decode_blocks:
    def run(fields, scales, shape, channels_last, encoding, grid, block, dtype):
        how = Encoding.of(encoding)
        return block_kernels(fields.device.type, how).decode_blocks(
            fields, scales, shape, channels_last, how, grid, tuple(block), dtype
        )

    def fake(fields, scales, shape, channels_last, encoding, grid, block, dtype):
        return empty(shape, channels_last, dtype, fields.device)


@functools.cache
def _largest_fields(form: Format) -> int:
    """A byte of fields of the largest code."""
    field = int(form.to_fields(torch.tensor(form.limit, device="cpu")))
    return field | field << 4 if form.field_bits == 4 else field


@operator(
    "block_mask(Tensor x, Tensor scales, Tensor tensor_scale, str encoding, SymInt[] grid, int[] block) -> Tensor"
)
class block_mask:
    """uint8, a bit an element of x in memory order as of `relu_`: set where |x| is below the end of its block's range.

    scales, tensor_scale: of encode_blocks. Blocks whose scale is 0, of which nothing is clipped, and NaN have all bits.
    """

    def run(x, scales, tensor_scale, encoding, grid, block):
        how = Encoding.of(encoding)
        fields = scales.new_full((how.form.field_bytes(x.numel()),), _largest_fields(how.form), dtype=torch.uint8)
        if how.scale_format != "e8m0":  # whose byte 0 is a power of two
            scales = torch.where(scales == 0, 126, scales)  # as a byte of e4m3, 448
        kernels, layout = block_kernels(x.device.type, how), (x.shape, is_channels_last(x))
        ends = kernels.decode_blocks(fields, scales, *layout, how, grid, tuple(block), torch.float32)
        ends = ends.mul_(tensor_scale) if how.has_tensor_scale else ends
        return backend_for(x.device.type).relu_(ends.sub_(x.abs()), None)

    def fake(x, scales, tensor_scale, encoding, grid, block):
        return x.new_empty((x.numel() + 7) // 8, dtype=torch.uint8)


@operator("hadamard(Tensor x, SymInt[] grid, int axis, int size, Tensor? signs) -> Tensor")
class hadamard:
    def run(x, grid, axis, size, signs):
        return rotation_kernels(x.device.type).hadamard(x, grid, axis, size, signs)

    def fake(x, grid, axis, size, signs):
        return torch.empty_like(dense(x), dtype=torch.float32)


@operator("signs(Tensor stream, int size) -> Tensor")
class signs:
    def run(stream, size):
        return rotation_kernels(stream.device.type).signs(stream, size)

    def fake(stream, size):
        return stream.new_empty(size, dtype=torch.float32)


@operator("relu_(Tensor(a!) x, float? most=None, Tensor(b!)? found=None, bool moments=False) -> Tensor")
class relu_:
    def run(x, most=None, found=None, moments=False):
        return backend_for(x.device.type).relu_(x, most, found, moments)

    def fake(x, most=None, found=None, moments=False):
        return x.new_empty((x.numel() + 7) // 8, dtype=torch.uint8)


@operator("relu_backward(Tensor grad, Tensor mask, bool channels_last) -> Tensor")
class relu_backward:
    def run(grad, mask, channels_last):
        return backend_for(grad.device.type).relu_backward(grad, mask, channels_last)

    def fake(grad, mask, channels_last):
        return empty(grad.shape, channels_last, grad.dtype, grad.device)


@operator(
    "int8_conv(Tensor a, Tensor w, Tensor scale, int[] stride, int[] padding, int[] dilation, ScalarType dtype, "
    "bool channels_last, Tensor signed, int groups=1) -> Tensor"
)
class int8_conv:
    def run(a, w, scale, stride, padding, dilation, dtype, channels_last, signed, groups=1):
        how = stride, padding, dilation, dtype, channels_last
        return backend_for("cpu").int8_conv(a, w, scale, *how, signed, groups)

    def fake(a, w, scale, stride, padding, dilation, dtype, channels_last, signed, groups=1):
        ends = zip(a.shape[2:], w.shape[2:], stride, padding, dilation, strict=True)
        size = (a.shape[0], w.shape[0], *(int8.out_size(*end) for end in ends))
        return empty(size, channels_last, dtype, a.device)


@operator(
    "int8_conv_dgrad(Tensor g, Tensor w, Tensor scale, SymInt[] shape, int[] stride, int[] padding, int[] dilation, "
    "ScalarType dtype, bool channels_last, Tensor signed, int groups=1) -> Tensor"
)
class int8_conv_dgrad:
    def run(g, w, scale, shape, stride, padding, dilation, dtype, channels_last, signed, groups=1):
        how = stride, padding, dilation, dtype, channels_last, signed, groups
        return backend_for("cpu").int8_conv_dgrad(g, w, scale, shape, *how)

    def fake(g, w, scale, shape, stride, padding, dilation, dtype, channels_last, signed, groups=1):
        return empty(shape, channels_last, dtype, g.device)


@operator(
    "int8_conv_wgrad(Tensor[] grads, Tensor a, int[] kernel, int[] stride, int[] padding, int[] dilation, "
    "int groups=1) -> Tensor"
)
class int8_conv_wgrad:
    def run(grads, a, kernel, stride, padding, dilation, groups=1):
        return backend_for("cpu").int8_conv_wgrad(grads, a, kernel, stride, padding, dilation, groups)

    def fake(grads, a, kernel, stride, padding, dilation, groups=1):
        shape = (grads[0].shape[1], a.shape[1] // groups, *kernel)
        return a.new_empty((shape[0], *kernel, shape[1]), dtype=torch.float32).permute(0, 3, 1, 2)


@operator("int8_linear(Tensor a, Tensor w, Tensor scale, ScalarType dtype, Tensor signed, bool adjoint) -> Tensor")
class int8_linear:
    def run(a, w, scale, dtype, signed, adjoint):
        return backend_for("cpu").int8_linear(a, w, scale, dtype, signed, adjoint)

    def fake(a, w, scale, dtype, signed, adjoint):
        return a.new_empty((*a.shape[:-1], w.shape[int(adjoint)]), dtype=dtype)


@operator("int8_linear_wgrad(Tensor[] grads, Tensor a) -> Tensor")
class int8_linear_wgrad:
    def run(grads, a):
        return backend_for("cpu").int8_linear_wgrad(grads, a)

    def fake(grads, a):
        return a.new_empty((grads[0].shape[-1], a.shape[-1]), dtype=torch.float32)


@operator("forward_only(Tensor x, Tensor activation, Tensor weight) -> Tensor")
class forward_only:
    """x as a result of activation and weight that has no derivative, and says so."""

    def run(x, activation, weight):
        return x.clone()

    def fake(x, activation, weight):
        return torch.empty_like(x)


def _refuse_backward(*_):
    raise TensorError("what torch.jit.trace made of a quantized layer has no gradient: train the model itself")


torch.library.register_autograd("luqrun::forward_only", _refuse_backward, lib=LIBRARY)
