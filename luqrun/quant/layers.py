"""Layers whose three GEMMs run on codes: linear and conv2d (luqrun.quant.attention has the third kind).

Each is its torch twin with the same parameters and state_dict keys; `QuantLayer` adds the recipe and the draws.
"""

from __future__ import annotations

import weakref
from itertools import chain

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from luqrun.errors import TensorError, UserError
from luqrun.internals.of_torch import (
    PLAIN,
    has_dispatch,
    has_tangent,
    is_transformed,
    is_watched,
    outermost_module,
    padding_of_each_side,
    repeats_forward,
    run_while_traced,
)
from luqrun.quant import mfbprop_gemms
from luqrun.quant.draws import CopyGroup, first_streams, rename_copies
from luqrun.quant.finetune import Phase
from luqrun.quant.function import QuantizedGemm, traced_gemm
from luqrun.quant.gemms import ConvOp, LinearOp, use_int8
from luqrun.quant.kernels import fuses, ops
from luqrun.quant.kernels.philox import MICRO_STEP, RANKS, STEP
from luqrun.quant.plan import Plan
from luqrun.quant.quantizer import update_hindsight
from luqrun.quant.recipe import GEMMS, OPERANDS, Recipe


class QuantLayer(nn.Module):
    """What a quantized layer has beyond its twin.

    Draws: `streams`, a row an operand, name the next forward whose gradient is wanted, in training or evaluation mode;
    each one advances their micro_step, and `set_step` restarts it. Other forwards always draw the same (of recipes with
    a stochastic forward). finetune: what the recipe becomes in the last phase of a training; None outside of it.
    health: a dict to be filled by the next training pass, or None. kept: a dict for what is made of weights that do not
    change (convert.unchanged_weights), or None. shares_ranges: in training, ranges of activations
    and gradients are those of all processes. multiplication_free: whether dgrad and wgrad run in
    luqrun.quant.mfbprop_gemms. computed: whether it ever did, outside of compiled code; in a list, which
    replicas share.
    """

    recipe: Recipe
    streams: Tensor
    copies: CopyGroup
    finetune: Phase | None
    health: dict | None
    kept: dict | None
    shares_ranges: bool
    multiplication_free: bool = False
    computed: list[bool]

    @classmethod
    def from_module(cls, module: nn.Module, recipe: Recipe, seed: int, index: int):
        """A layer with the parameters, buffers and hooks of `module`, which it replaces."""
        layer = cls.__new__(cls)
        layer.__dict__ = dict(module.__dict__)
        layer.__dict__["_buffers"] = dict(module._buffers)
        layer.recipe, layer.finetune, layer.health, layer.kept = recipe, None, None, None
        layer.shares_ranges = False
        layer.streams, layer.copies, layer.renamed_in = first_streams(seed, index), CopyGroup(), None
        layer.computed = [False]
        layer._prepare_device()
        layer.remembers = [
            operand for operand in OPERANDS if any(each.range == "hindsight" for each in recipe.quantizers(operand))
        ]
        for operand in layer.remembers:
            with torch.inference_mode(False):
                maximum = torch.zeros((), dtype=torch.float32, device=layer._device())
            layer.register_buffer(f"{operand}_hindsight", maximum)
        return layer

    def _apply(self, fn, recurse: bool = True):
        unmade = [key for key, buffer in self._buffers.items() if buffer is not None and buffer.is_meta]
        super()._apply(fn, recurse)
        for key, buffer in self._buffers.items():
            if key.endswith("_hindsight"):  # float32 also in a half-precision model: gradients leave fp16's range
                self._buffers[key] = buffer.float()
                if key in unmade and not buffer.is_meta:  # to_empty: no parameter initialisation reaches it
                    self._buffers[key].zero_()
        self._prepare_device()
        return self

    def _prepare_device(self) -> None:
        """Prepare for the device that the parameters are on, before a compiler looks: it cannot trace the loading of
        kernels, and would compile once more for streams that move in the first forward."""
        device = self._device()
        if device.type != "meta":  # there the names of the draws would be lost
            use_int8(device.type), fuses(device.type), ops.a_micro_step(device)
            self.multiplication_free = mfbprop_gemms.is_chosen(device.type)
            if self.multiplication_free:
                mfbprop_gemms.check(self.recipe)
            self._move_streams(device)

    def _move_streams(self, device: torch.device) -> None:
        with torch.inference_mode(False):  # what is made within can never be changed outside
            self.streams = self.streams.to(device)

    def _device(self) -> torch.device:
        # A frozen weight may be a buffer, or an attribute.
        return next(chain(self.parameters(), self.buffers(), [getattr(self, "weight", None)])).device

    def set_step(self, step: int) -> None:
        """Name the draws of the coming training forwards: (step, micro_step 0, 1, ...)."""
        streams = self.streams
        has_numbers = streams.is_cpu and type(streams) in PLAIN  # and is no FakeTensor
        names = streams.numpy() if has_numbers else streams  # NumPy takes a fifth of the time
        names[:, STEP], names[:, MICRO_STEP] = step, 0

    def quantized_gemm(self, op, activation: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """op(activation, weight) + bias with this layer's recipe, in the dtype autocast asks for."""
        if not torch.compiler.is_compiling():
            self.computed[0] = True
        device_type = activation.device.type
        autocast = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
        activation, weight = checked(activation, weight, autocast)
        if bias is not None and not autocast and bias.dtype != weight.dtype:
            raise TensorError(f"a quantized layer has a {bias.dtype} bias beside {weight.dtype} weights")
        casts = autocast and activation.dtype != torch.float64  # which autocast leaves as it is
        dtype = torch.get_autocast_dtype(device_type) if casts else activation.dtype
        gemm = traced_gemm if torch.jit.is_tracing() else QuantizedGemm.apply
        output = gemm(activation, weight, op, self._plan(op, activation, weight), dtype)
        if bias is None:
            return output
        bias = bias.to(dtype)
        bias = bias.view(-1, 1, 1) if isinstance(op, ConvOp) else bias
        return output + bias if is_watched() else output.add_(bias)  # who watches may keep the output

    def _plan(self, op: LinearOp | ConvOp, activation: Tensor, weight: Tensor) -> Plan:
        compiling = torch.compiler.is_compiling()  # a compiled layer has no memory in Python
        wanted = torch.is_grad_enabled() and (activation.requires_grad or weight.requires_grad)
        wanted = wanted and not torch.jit.is_tracing()  # which repeats what it traces, and expects the same
        repeated, counts = (False, True) if compiling or not wanted else repeats_forward()
        if repeated:
            self._refuse_to_repeat()
        learning = wanted and counts
        recipe = self.recipe
        if self.finetune is not None:
            recipe = self.finetune.training if self.training else self.finetune.evaluation
            if self.training and learning:
                self._observe_unquantized(recipe, activation, weight)
        return Plan(
            op=op,
            fprop=recipe.fprop,
            dgrad=recipe.dgrad,
            wgrad=recipe.wgrad,
            streams=self._streams(activation.device, wanted, learning),
            hindsight={name: self._buffers[f"{name}_hindsight"] for name in self.remembers},
            observe=self._observe if learning else None,
            health=self.health if learning and not compiling else None,
            keep=torch.is_grad_enabled(),
            reader=None if compiling else self,
            kept=None if compiling else self.kept,
            share=over_processes if self.shares_ranges and self.training and dist.is_initialized() else None,
            multiplication_free=self.multiplication_free,
            uses=recipe.uses,
        )

    def _refuse_to_repeat(self) -> None:
        """Raise UserError where activation checkpointing would repeat a forward with other codes."""
        for operand in ("weight", "activation"):
            for quantizer in self.recipe.quantizers(operand):
                if not quantizer.repeats:
                    raise UserError(
                        f"activation checkpointing cannot repeat {operand}={quantizer}; "
                        "it needs a forward with rounding=nearest and no hindsight range"
                    )
        for gemm in GEMMS:
            rotation = getattr(self.recipe, gemm).hadamard
            if rotation is not None and rotation.signs == "drawn":
                raise UserError(
                    f"activation checkpointing cannot repeat quant.{gemm}.signs=drawn; allowed: none, fixed"
                )

    def _streams(self, device: torch.device, wanted: bool, learning: bool) -> Tensor:
        """The names of this forward's draws, a row an operand."""
        if device.type == "meta":  # there they would be lost
            return self.streams.to(device)
        if self.streams.device != device:
            self._move_streams(device)
        if self.copies.was_copied:
            self._rename_copies()
        if not wanted and not self.recipe.has_stochastic_forward:
            return self.streams
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        assert rank < RANKS
        return ops.next_draws(self.streams, learning, not wanted, rank, self.recipe.redraw_every)

    @run_while_traced
    def _rename_copies(self) -> None:
        model = outermost_module()
        if model is not None and (self.renamed_in is None or self.renamed_in() is not model):
            rename_copies(module for module in model.modules() if isinstance(module, QuantLayer))
            self.renamed_in = weakref.ref(model)

    def __getstate__(self):
        return {**super().__getstate__(), "renamed_in": None}

    def _observe_unquantized(self, recipe: Recipe, activation: Tensor, weight: Tensor) -> None:
        """Remember the ranges of what a training pass with `recipe` does not quantize: evaluation will need them."""
        # The backward pass quantizes an operand only where the gradient of the other is wanted.
        activations = recipe.fprop.activation, recipe.wgrad.activation if weight.requires_grad else None
        weights = recipe.fprop.weight, recipe.dgrad.weight if activation.requires_grad else None
        for operand, x, quantizers in (("activation", activation, activations), ("weight", weight, weights)):
            if operand in self.remembers and quantizers == (None, None) and x.numel():
                self._observe(operand, ops.statistics(x.detach(), False)[0].float())

    def _observe(self, operand: str, maximum: Tensor) -> None:
        if operand != "gradient" and not self.training:  # as batch norm's statistics; but a backward pass is training
            return
        # One maximum for all ranks: their copies of the buffer stay equal.
        if dist.is_available() and dist.is_initialized():
            maximum = maximum.clone()
            dist.all_reduce(maximum, op=dist.ReduceOp.MAX)
        momentum = next(q.hindsight_momentum for q in self.recipe.quantizers(operand) if q.range == "hindsight")
        update_hindsight(self._buffers[f"{operand}_hindsight"], maximum, momentum)

    def extra_repr(self) -> str:
        return ", ".join(part for part in (super().extra_repr(), str(self.recipe)) if part)


def checked(activation: Tensor, weight: Tensor, autocast: bool) -> tuple[Tensor, Tensor]:
    """Both as plain tensors. TensorError for what torch refuses too, and for tensors without memory of their own."""
    if not torch.compiler.is_compiling():
        if is_transformed():
            raise TensorError("quantized layers do not work inside torch.func's transforms (grad, vmap, jvp, ...)")
        for x in (activation, weight):
            if has_dispatch(x) or x.is_nested or x.layout != torch.strided:
                kind = type(x).__name__ if type(x) not in PLAIN else str(x.layout).removeprefix("torch.")
                raise TensorError(f"quantized layers take plain dense tensors, not a {kind}: its memory is elsewhere")
            if has_tangent(x):
                raise TensorError("quantized layers do not work in forward-mode differentiation")
        activation, weight = (x if type(x) in PLAIN else x.as_subclass(Tensor) for x in (activation, weight))
    fit = activation.is_floating_point() and weight.is_floating_point()
    if autocast:  # which leaves float64 as it is
        fit = fit and (activation.dtype == torch.float64) == (weight.dtype == torch.float64)
    else:
        fit = fit and activation.dtype == weight.dtype
    if not fit:
        raise TensorError(
            f"a quantized layer with {weight.dtype} weights takes floating tensors of the same dtype, "
            f"not {activation.dtype}".replace("torch.", "")
        )
    return activation, weight


def as_leaf(layer: nn.Module, *inputs, **keywords):
    """While torch.fx traces: the call of `layer` as one node of the graph, as of torch's own layers; else None."""
    for each in (*inputs, *keywords.values()):
        if isinstance(each, Proxy):
            tracer = each.tracer
            return tracer.create_proxy("call_module", tracer.path_of_module(layer), inputs, keywords)
    return None


def over_processes(statistics: Tensor) -> Tensor:
    """The statistics (float64 (4,), see Quantizer.measure) of one part a process as those of all: maxima, mean sums."""
    parts = statistics.new_empty(dist.get_world_size() * 4)
    dist.all_gather_into_tensor(parts, statistics)
    parts = parts.view(-1, 4)
    return torch.cat([parts[:, :2].amax(0), parts[:, 2:].mean(0)])


class QuantLinear(QuantLayer, nn.Linear):
    """nn.Linear on codes: (..., in_features) -> (..., out_features)."""

    def forward(self, input: Tensor) -> Tensor:
        node = as_leaf(self, input)
        if node is not None:
            return node
        if input.dim() == 0:
            raise TensorError("a quantized Linear takes tensors of one dimension at least, not a single number")
        return self.quantized_gemm(LinearOp(), input, self.weight, self.bias)


class QuantConv2d(QuantLayer, nn.Conv2d):
    """nn.Conv2d on codes: any stride, padding, padding mode, dilation and groups."""

    def forward(self, input: Tensor) -> Tensor:
        node = as_leaf(self, input)
        if node is not None:
            return node
        if input.dim() not in (3, 4):
            raise TensorError(
                f"a quantized Conv2d takes (N, C, H, W) or (C, H, W), batched or unbatched, not {tuple(input.shape)}"
            )
        batched = input if input.dim() == 4 else input.unsqueeze(0)
        padding = self.padding
        if self.padding_mode != "zeros" or isinstance(padding, str):
            # Modes and the uneven `same` are a pass of their own, before quantization.
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            batched = F.pad(batched, padding_of_each_side(self), mode=mode)
            padding = (0, 0)
        op = ConvOp(self.stride, padding, self.dilation, self.groups)
        output = self.quantized_gemm(op, batched, self.weight, self.bias)
        return output if input.dim() == 4 else output.squeeze(0)
