"""The weights of a quantized model as its evaluation multiplies them: packed codes and scales, and how to read them.

value = table[code] * scale * tensor_scale, in float32, is bit for bit what enters fprop.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from luqrun.quant.convert import quantized_layers
from luqrun.quant.formats import pack, unpack
from luqrun.quant.gemms import NONE, ONE, ConvOp, LinearOp
from luqrun.quant.kernels.layout import from_memory_order
from luqrun.quant.layers import QuantLayer
from luqrun.quant.operands import Stored
from luqrun.quant.rotation import signs_of

SCALES = {"e8m0": torch.float8_e8m0fnu, "e4m3": torch.float8_e4m3fn, "fp32": torch.float32}


@dataclass(frozen=True)
class Layout:
    """How to read one weight. shape: of it; bits: of a code; table: the value of each code, 2^bits of them.

    block: how many elements along axes 0 and 1 share a scale (null: all do), and groups: into how many parts of equal
    size axis 0 is divided before that; the last block of an axis may be short. hadamard: null, or the size of the
    groups that were rotated along axis 1 before quantization: the values are those of the rotated weight, to be
    multiplied by activations that are rotated alike.
    """

    format: str
    shape: list[int]
    bits: int
    table: list[float]
    block: list[int] | None = None
    groups: int = 1
    hadamard: int | None = None


@dataclass(frozen=True)
class PackedWeight:
    """codes: uint8, code i in the bits from i * bits of a little-endian string, row-major. scale: float32 (), or one
    for each block, as (blocks of axis 0, of axis 1, ...rest), in their own format. tensor_scale: float32 ().

    signs: float32, of the rotation before quantization; None without.
    """

    layout: Layout
    codes: Tensor
    scale: Tensor
    tensor_scale: Tensor
    signs: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """What a file keeps, by name."""
        found = {"codes": self.codes, "scale": self.scale, "tensor_scale": self.tensor_scale}
        return found if self.signs is None else {**found, "signs": self.signs}

    def description(self) -> dict:
        """The layout as plain JSON."""
        return asdict(self.layout)


@torch.no_grad()
def packed_weights(model: nn.Module) -> Iterator[tuple[str, PackedWeight]]:
    """(name of the parameter, weight) for each layer whose recipe quantizes weights in fprop, as evaluation does.

    Of attention it is the packed projection of queries, keys and values, as self-attention multiplies it.
    """
    for name, layer in quantized_layers(model):
        if layer.recipe.fprop.weight is None:
            continue
        own = "in_proj_weight" if isinstance(layer, nn.MultiheadAttention) else "weight"
        training, layer.training = layer.training, False
        try:
            packed = _packed(layer, getattr(layer, own))
        finally:
            layer.training = training
        yield f"{name}.{own}".lstrip("."), packed


def _packed(layer: QuantLayer, weight: Tensor) -> PackedWeight:
    weight = weight.detach().contiguous()  # in this order codes and scales are read below
    op = ConvOp(ONE, NONE, ONE, layer.groups) if isinstance(layer, nn.Conv2d) else LinearOp()
    plan = layer._plan(op, weight, weight)
    _, stored = plan.quantize("fprop", "weight", weight, torch.float32, packed=True)
    how, shape, rotation = stored.encoding, list(weight.shape), layer.recipe.fprop.hadamard
    fields = unpack(stored.tensors[0], how.form.field_bits, weight.numel())
    fields = from_memory_order(fields, stored.shape, stored.channels_last).contiguous()
    signed = torch.ones((), dtype=torch.bool) if how.block is not None else stored.tensors[2].cpu()
    table = how.form.from_fields(torch.arange(2**how.form.bits), signed).float()
    if how.block is None:
        scale, tensor_scale, block, groups = stored.tensors[1], torch.ones(()), None, 1
    else:
        table = table * how.form.unit
        scale, block, groups = _scales(stored, op, shape)
        tensor_scale = stored.tensors[2]
    layout = Layout(how.form.name, shape, how.form.bits, table.tolist(), block, groups, rotation and rotation.size)
    signs = None if rotation is None else signs_of(rotation, plan.stream("weight"), "fprop")
    mask = 2**how.form.bits - 1  # a field may be kept in more bits than a code has
    return PackedWeight(layout, pack(fields & mask, how.form.bits), scale, tensor_scale, signs)


def _scales(stored: Stored, op: LinearOp | ConvOp, shape: list[int]) -> tuple[Tensor, list[int], int]:
    """The scales by block of axes 0 and 1 (and by tap), in their own format; the block; and the groups of axis 0."""
    how = stored.encoding
    kept = stored.tensors[1].view(SCALES[how.scale_format])
    high, wide = how.tile or (1, how.block)
    groups = op.groups if how.tile else 1
    rows, columns, taps = groups * -(-(shape[0] // groups) // high), -(-shape[1] // wide), shape[2:]
    if how.tile or not taps:  # its memory is channels_last, the taps before the columns
        order = kept.view(torch.uint8) if kept.element_size() == 1 else kept
        order = order.view(groups, rows // groups, *taps, columns).movedim(-1, 2).reshape(rows, columns, *taps)
        return order.contiguous().view(kept.dtype), [high, wide], groups
    return kept.view(rows, columns, *taps), [high, wide], groups
