"""Layers whose three GEMMs run on codes: linear, conv2d, and attention with its projections.

Each is its torch twin with the same parameters and state_dict keys; `QuantLayer` adds the recipe and the draws.
"""

from __future__ import annotations

from itertools import chain

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from luqrun.errors import UserError
from luqrun.gemms import ConvOp, LinearOp, use_int8
from luqrun.kernels import fuses
from luqrun.kernels.layout import dense
from luqrun.kernels.philox import STREAM_FIELDS, make_stream
from luqrun.qgemm import MaskedReLUFunction, Plan, QuantizedGemm
from luqrun.quantizer import update_hindsight
from luqrun.recipes import OPERANDS, Recipe

STEP_FIELD, MICRO_STEP_FIELD, RANK_FIELD = (STREAM_FIELDS.index(name) for name in ("step", "micro_step", "rank"))
EVALUATION_STEP = 2**32 - 1


class QuantLayer(nn.Module):
    """What a quantized layer has beyond its twin.

    Draws: `streams`, a row an operand, name the next training forward; each one advances their micro_step, and
    `set_step` restarts it.
    Evaluation draws (of recipes with a stochastic forward) are always the same. finetune: in training, only the
    weight is quantized (FNT); evaluation is the recipe's all the same. health: a dict to be filled by the next
    training pass, or None. shares_ranges: in training, ranges of activations and gradients are those of all processes.
    computed: whether it ever did, outside of compiled code; in a list, which replicas share.
    """

    recipe: Recipe
    streams: Tensor
    finetune: bool
    health: dict | None
    shares_ranges: bool
    computed: list[bool]

    @classmethod
    def from_module(cls, module: nn.Module, recipe: Recipe, seed: int, index: int):
        """A layer with the parameters, buffers and hooks of `module`, which it replaces."""
        layer = cls.__new__(cls)
        layer.__dict__ = dict(module.__dict__)
        layer.__dict__["_buffers"] = dict(module._buffers)
        layer.recipe, layer.finetune, layer.health, layer.shares_ranges = recipe, False, None, False
        streams = [make_stream(seed, layer=index, operand=number) for number in range(len(OPERANDS))]
        layer.streams, layer.dry_forwards = torch.stack(streams), 0
        layer.computed = [False]
        layer._settle()
        quantizers = {operand: getattr(recipe, operand) for operand in OPERANDS}
        layer.remembers = [name for name, each in quantizers.items() if each is not None and each.range == "hindsight"]
        for operand in layer.remembers:
            maximum = torch.zeros((), dtype=torch.float32, device=layer._device())
            layer.register_buffer(f"{operand}_hindsight", maximum)
        return layer

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        for key, buffer in self._buffers.items():
            if key.endswith("_hindsight"):  # float32 also in a half-precision model: gradients leave fp16's range
                self._buffers[key] = buffer.float()
        self._settle()
        return self

    def _settle(self) -> None:
        """Prepare for the device that the parameters are on, before a compiler looks: it cannot trace the loading of
        kernels, and would compile once more for streams that move in the first forward."""
        device = self._device()
        if device.type != "meta":  # there the names of the draws would be lost
            use_int8(device.type), fuses(device.type)
            self.streams = self.streams.to(device)

    def _device(self) -> torch.device:
        # A frozen weight may be a buffer, or an attribute.
        return next(chain(self.parameters(), self.buffers(), [getattr(self, "weight", None)])).device

    def set_step(self, step: int) -> None:
        """Name the draws of the coming training forwards: (step, micro_step 0, 1, ...)."""
        self.streams[:, STEP_FIELD] = step
        self.streams[:, MICRO_STEP_FIELD] = 0

    def quantized_gemm(self, op, activation: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """op(activation, weight) + bias with this layer's recipe, in the dtype autocast asks for."""
        if not torch.compiler.is_compiling():
            self.computed[0] = True
        device_type = activation.device.type
        autocast = torch.is_autocast_enabled(device_type)
        dtype = torch.get_autocast_dtype(device_type) if autocast else activation.dtype
        output = QuantizedGemm.apply(activation, weight, op, self._plan(activation.device), dtype)
        if bias is None:
            return output
        return output + bias.to(dtype).view((-1, 1, 1) if isinstance(op, ConvOp) else (-1,))

    def _plan(self, device: torch.device) -> Plan:
        # Compiled, a layer has no memory in Python: no health, and no activation checkpointing of its own.
        compiling = torch.compiler.is_compiling()
        learning = self.training and torch.is_grad_enabled() and (compiling or not self._is_repetition())
        if self.training and not torch.is_grad_enabled() and not compiling:
            self.dry_forwards += 1
        high_precision = self.training and self.finetune
        return Plan(
            weight=self.recipe.weight,
            activation=None if high_precision else self.recipe.activation,
            gradient=None if high_precision else self.recipe.gradient,
            streams=self._streams(device, learning),
            hindsight={name: self._buffers[f"{name}_hindsight"] for name in self.remembers},
            observe=self._observe if learning else None,
            health=self.health if learning and not compiling else None,
            keep=torch.is_grad_enabled(),
            share=over_processes if self.shares_ranges and self.training and dist.is_initialized() else None,
        )

    def _is_repetition(self) -> bool:
        """Whether activation checkpointing repeats a training forward whose draws and maxima were counted before.

        A repetition runs inside a backward pass. But reentrant checkpointing does a segment's first pass without
        gradients, a dry one: there the pass inside the backward is the one that counts.
        """
        if torch._C._current_graph_task_id() == -1:
            self.dry_forwards = 0
            return False
        for operand in ("weight", "activation"):
            quantizer = getattr(self.recipe, operand)
            if quantizer is not None and not quantizer.repeats:
                raise UserError(
                    f"activation checkpointing cannot repeat {operand}={quantizer}; "
                    "it needs a forward with rounding=nearest and no hindsight range"
                )
        if self.dry_forwards == 0:
            return True
        self.dry_forwards -= 1
        return False

    def _streams(self, device: torch.device, learning: bool) -> dict[str, Tensor]:
        if self.streams.device != device:
            self.streams = self.streams.to(device)
        if dist.is_available() and dist.is_initialized():
            self.streams[:, RANK_FIELD] = dist.get_rank()
        streams = self.streams.clone()
        if learning:
            self.streams[:, MICRO_STEP_FIELD].add_(1)
            if self.recipe.gradient is not None and self.recipe.gradient.redraw_every > 1:
                counters = streams[OPERANDS.index("gradient"), STEP_FIELD : MICRO_STEP_FIELD + 1]
                counters.div_(self.recipe.gradient.redraw_every, rounding_mode="floor")
        else:
            streams[:, STEP_FIELD], streams[:, MICRO_STEP_FIELD] = EVALUATION_STEP, 0
        return dict(zip(OPERANDS, streams.unbind(), strict=True))

    def _observe(self, operand: str, maximum: Tensor) -> None:
        # One maximum for all ranks: their copies of the buffer stay equal.
        if dist.is_available() and dist.is_initialized():
            maximum = maximum.clone()
            dist.all_reduce(maximum, op=dist.ReduceOp.MAX)
        momentum = getattr(self.recipe, operand).hindsight_momentum
        update_hindsight(self._buffers[f"{operand}_hindsight"], maximum, momentum)

    def extra_repr(self) -> str:
        return ", ".join(part for part in (super().extra_repr(), str(self.recipe)) if part)


def over_processes(statistics: Tensor) -> Tensor:
    """The statistics (float64 (4,), see Quantizer.measure) of one part a process as those of all: maxima, mean sums."""
    parts = statistics.new_empty(dist.get_world_size() * 4)
    dist.all_gather_into_tensor(parts, statistics)
    parts = parts.view(-1, 4)
    return torch.cat([parts[:, :2].amax(0), parts[:, 2:].mean(0)])


class QuantLinear(QuantLayer, nn.Linear):
    """nn.Linear on codes: (..., in_features) -> (..., out_features)."""

    def forward(self, input: Tensor) -> Tensor:
        return self.quantized_gemm(LinearOp(), input, self.weight, self.bias)


class QuantConv2d(QuantLayer, nn.Conv2d):
    """nn.Conv2d on codes: any stride, padding, padding mode, dilation and groups."""

    def forward(self, input: Tensor) -> Tensor:
        batched = input if input.dim() == 4 else input.unsqueeze(0)
        padding = self.padding
        if self.padding_mode != "zeros" or isinstance(padding, str):
            # Modes and the uneven `same` are a pass of their own, before quantization.
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            batched = F.pad(batched, self._reversed_padding_repeated_twice, mode=mode)
            padding = (0, 0)
        op = ConvOp(self.stride, padding, self.dilation, self.groups)
        output = self.quantized_gemm(op, batched, self.weight, self.bias)
        return output if input.dim() == 4 else output.squeeze(0)


class MaskedReLU(nn.ReLU):
    """nn.ReLU that keeps one bit an element for its backward pass, where nn.ReLU keeps its output.

    The layer after it keeps packed codes instead of that output, so nothing else would hold it. Compiled, it is
    nn.ReLU: there the compiler fuses it with its neighbours and chooses what to keep.
    """

    def forward(self, input: Tensor) -> Tensor:
        plain = input.dtype not in (torch.float32, torch.bfloat16) or not input.requires_grad
        if plain or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return super().forward(input)
        if self.inplace and (input._is_view() or dense(input) is not input):
            return super().forward(input)
        return MaskedReLUFunction.apply(input, self.inplace)


class QuantMultiheadAttention(QuantLayer, nn.MultiheadAttention):
    """nn.MultiheadAttention whose projections are linear layers on codes.

    The packed input projection is one layer (one scale for the weights of query, key and value); out_proj is a
    QuantLinear of its own. The attention products stay in high precision: the paper quantizes layers.
    """

    @classmethod
    def from_module(cls, module: nn.MultiheadAttention, recipe: Recipe, seed: int, index: int):
        if not module._qkv_same_embed_dim or module.bias_k is not None or module.add_zero_attn:
            raise UserError(
                "MultiheadAttention with kdim, vdim, add_bias_kv or add_zero_attn cannot be quantized: put it in skip"
            )
        return super().from_module(module, recipe, seed, index)

    def _project(self, x: Tensor, first: int, last: int) -> Tensor:
        rows = slice(first * self.embed_dim, last * self.embed_dim)
        whole = first == 0 and last == 3
        weight = self.in_proj_weight if whole else self.in_proj_weight[rows]
        bias = self.in_proj_bias if whole or self.in_proj_bias is None else self.in_proj_bias[rows]
        return self.quantized_gemm(LinearOp(), x, weight, bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As nn.MultiheadAttention; `is_causal` is a hint there, and needs `attn_mask` too."""
        if is_causal and attn_mask is None:
            raise UserError("is_causal=True needs attn_mask, as in nn.MultiheadAttention")
        if query is key and key is value:
            q, k, v = self._project(query, 0, 3).chunk(3, dim=-1)
        elif key is value:
            q, (k, v) = self._project(query, 0, 1), self._project(key, 1, 3).chunk(2, dim=-1)
        else:
            q, k, v = (self._project(x, i, i + 1) for i, x in enumerate((query, key, value)))
        batched = q.dim() == 3
        if batched and not self.batch_first:
            q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        # (..., length, heads * head_dim) -> (..., heads, length, head_dim)
        q, k, v = (x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(-3, -2) for x in (q, k, v))
        mask = self._mask(attn_mask, key_padding_mask, q)
        dropout = self.dropout if self.training else 0.0
        if need_weights:
            scores = q @ k.transpose(-2, -1) / self.head_dim**0.5
            weights = (scores if mask is None else scores + mask).softmax(-1)
            attended = F.dropout(weights, dropout) @ v
            weights = weights.mean(-3) if average_attn_weights else weights
        else:
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
            weights = None
        attended = attended.transpose(-3, -2).flatten(-2)
        if batched and not self.batch_first:
            attended = attended.transpose(0, 1)
        return self.out_proj(attended), weights

    def _mask(self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor) -> Tensor | None:
        """Both masks as one additive mask that broadcasts against (..., heads, length, source)."""
        total = None
        for mask, is_padding in ((attn_mask, False), (key_padding_mask, True)):
            if mask is None:
                continue
            if mask.dtype == torch.bool:
                mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(mask, -torch.inf)
            if is_padding:
                mask = mask[..., None, None, :]
            elif mask.dim() == 3:
                mask = mask.view(*q.shape[:-2], *mask.shape[-2:])
            total = mask.to(q.dtype) if total is None else total + mask
        return total
