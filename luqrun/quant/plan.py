"""What one call of a layer does: which quantizer makes which operand of which GEMM, with which draws."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from luqrun.quant.encoding import Encoding
from luqrun.quant.gemms import ConvOp, LinearOp
from luqrun.quant.grids import Grid
from luqrun.quant.health import health, health_of_blocks
from luqrun.quant.kernels import ops
from luqrun.quant.kernels.layout import is_channels_last
from luqrun.quant.kernels.philox import of_gemm
from luqrun.quant.measured import statistics_of
from luqrun.quant.operands import EXACT, Mask, Operand, Stored, held_by, held_in_blocks, keeps_codes, scale_beside
from luqrun.quant.quantizer import QuantizedTensor, Quantizer
from luqrun.quant.recipe import OPERANDS, Dgrad, Fprop, Wgrad
from luqrun.quant.rotation import Rotation, rotate, signs_of, unrotate
from luqrun.quant.sharing import made_once
from luqrun.quant.uses import Uses, uses_of

MAX_INT8_DRAWS = 2  # more int8 GEMMs than this cost more than one in floating point


@dataclass
class Plan:
    """What one call of a layer does: its GEMMs `op`, the quantizers of their operands (None: high precision), draws
    and memory.

    streams: int64 (3, 6), the names of the draws, a row an operand. hindsight: by operand, the 0-dim maxima; observe is
    told the new ones and is None where they must not change. health: by operand, filled where it is a dict. keep:
    whether a backward pass may follow. reader: the layer (luqrun.quant.sharing). kept: where what is made of
    weights that do not change is kept, or None. share: what makes a tensor's statistics those of all processes
    (Quantizer.measure), for operands that are not the same in all of them. multiplication_free: whether dgrad and wgrad
    of two operands of codes are multiplied by luqrun.quant.mfbprop_gemms. signs: by GEMM, those of its rotation, once
    they were drawn. uses: of the three GEMMs.
    """

    op: LinearOp | ConvOp
    fprop: Fprop
    dgrad: Dgrad
    wgrad: Wgrad
    streams: Tensor
    hindsight: dict[str, Tensor]
    observe: Callable[[str, Tensor], None] | None = None
    health: dict | None = None
    keep: bool = True
    reader: nn.Module | None = None
    kept: dict | None = None
    share: Callable[[Tensor], Tensor] | None = None
    multiplication_free: bool = False
    signs: dict[str, Tensor | None] = field(default_factory=dict)
    uses: Uses | None = None

    def __post_init__(self):
        if self.uses is None:
            self.uses = uses_of(self.fprop, self.dgrad, self.wgrad)

    def quantize(
        self,
        gemm: str,
        operand: str,
        x: Tensor,
        dtype: torch.dtype,
        packed: bool = False,
        again: bool = False,
        masked: bool = False,
    ) -> tuple[Operand, Stored]:
        """x as an Operand of a GEMM, with one draw of codes of `dtype` (or float32 where that cannot hold them), and as
        what is kept of it with `packed`. again: another GEMM has quantized it in another way; then what is drawn is the
        GEMM's own, and nothing is remembered or told of it. masked: what is kept has the mask of what was clipped."""
        quantizer = getattr(getattr(self, gemm), operand)
        x = self._rotated(gemm, operand, x)
        if quantizer is None:
            return Operand((x,)), Stored((x,))
        stream = self._stream(gemm, operand, quantizer, again)
        share = None if operand == "weight" else self.share
        if quantizer.block is not None:
            how, (x, layout, grid) = quantizer.encoding, self._in_blocks(gemm, operand, x, quantizer)
            found = quantizer.run_blocks(x, stream, grid, held_in_blocks(how, dtype), packed, share)
            if not again and self.health is not None:
                self.health[operand] = health_of_blocks(x, found, quantizer, grid)
            stored = Stored((found.fields, found.scales, found.tensor_scale), how, *layout, gemm, operand)
            if masked:
                bits = ops.block_mask(x, found.scales, found.tensor_scale, how.key, grid.sizes, grid.block)
                stored = stored._replace(mask=Mask(bits, is_channels_last(x)))
            return Operand((found.values,), scale_beside(how, found.tensor_scale)), stored
        dtype = held_by(quantizer.form, dtype)
        few = packed and keeps_codes(x, dtype)
        codes, scale, signed, fields, maximum = quantizer.run(
            x, stream, self.hindsight.get(operand), dtype, packed and not few, share
        )
        if not again and operand in self.hindsight and self.observe is not None and x.numel():
            self.observe(operand, maximum)
        if not again and self.health is not None:
            self.health[operand] = health(x, QuantizedTensor(codes, scale, signed, quantizer.form))
        kept = codes if few else fields
        stored = Stored((kept, scale, signed), quantizer.encoding, x.shape, is_channels_last(x))
        return Operand((codes,), scale, signed), stored

    @property
    def at_once(self) -> tuple[Encoding, Encoding, Encoding] | None:
        """The encodings of activation, weight and gradient, where a pass needs to know nothing else (Uses.whole)."""
        alone = self.share is None and self.kept is None and not self.multiplication_free
        return self.uses.whole if alone else None

    def known(self, operand: str, x: Tensor, *beside: Tensor) -> Tensor | None:
        """Statistics of an operand that were found as it was made, for who quantizes without `quantize`; health is told
        of it here, and of the weight beside an activation."""
        quantizer = self.dgrad.gradient if operand == "gradient" else self.fprop.activation
        found = statistics_of(x, quantizer.range == "sawb")
        if self.health is not None:
            gemm = "dgrad" if operand == "gradient" else "fprop"
            self.quantize(gemm, operand, x, torch.int8)
            for weight in beside:
                self.quantize("fprop", "weight", weight, torch.int8)
            if operand == "gradient":
                self.health["gradient_exponents"] = exponent_counts(x)
        return found

    def has_blocks(self, gemm: str) -> bool:
        """Whether an operand of a GEMM is in blocks, which int8 does not hold."""
        return self.uses.blocks[gemm]

    def _in_blocks(self, gemm: str, operand: str, x: Tensor, quantizer: Quantizer) -> tuple[Tensor, tuple, Grid]:
        """x in memory that blocks can lie in, its shape and whether it is channels_last, and where they lie."""
        x = self.op.laid_out(x, quantizer.encoding)
        layout = x.shape, is_channels_last(x)
        return x, layout, self.op.grid(gemm, operand, *layout, quantizer.encoding)

    def stream(self, operand: str) -> Tensor:
        """The name of an operand's draw, int64 (6,)."""
        return self.streams[OPERANDS.index(operand)]

    def _stream(self, gemm: str, operand: str, quantizer: Quantizer, again: bool) -> Tensor:
        if not quantizer.is_stochastic:
            return self.streams  # nobody reads a name where nothing is drawn, and a row would be one more tensor
        return of_gemm(self.stream(operand), gemm) if again else self.stream(operand)

    def _rotated(self, gemm: str, operand: str, x: Tensor) -> Tensor:
        rotation = self.uses.rotations[gemm]
        if rotation is None:
            return x
        x = self.op.laid_out(x, None)
        lines = self.op.lines(gemm, operand, x.shape, is_channels_last(x))
        return rotate(x, lines, rotation, self._signs(gemm, rotation))

    def _signs(self, gemm: str, rotation: Rotation) -> Tensor | None:
        """Those of both operands, drawn once."""
        if torch.compiler.is_compiling():
            return signs_of(rotation, self.stream("weight"), gemm)
        if gemm not in self.signs:
            self.signs[gemm] = signs_of(rotation, self.stream("weight"), gemm)
        return self.signs[gemm]

    def _unrotated(self, operand: str, x: Tensor) -> Tensor:
        """x, which is in the axes that fprop rotated, in its own."""
        rotation = self.uses.rotations["fprop"]
        if rotation is None:
            return x
        lines = self.op.lines("fprop", operand, x.shape, is_channels_last(x))
        return unrotate(x, lines, rotation, self._signs("fprop", rotation))

    def trusted(self, operand: str, gradient: Tensor, mask: Mask) -> Tensor:
        """An operand's gradient without what the mask of fprop's clipping takes from it, in the axes fprop rotates."""
        return self._unrotated(operand, mask.apply(self._rotated("fprop", operand, gradient)))

    def quantize_forward(
        self, operand: str, x: Tensor, dtype: torch.dtype, keep: bool, learns: bool
    ) -> tuple[Operand, Stored]:
        """x for fprop, and with `keep` what the backward pass takes of it for its second GEMM. learns: whether its own
        gradient is wanted.

        Where several layers read one activation, the first of them quantizes it for all; and weights that do not change
        are quantized once.
        """
        use = self.uses.activation if operand == "activation" else self.uses.weight
        alone = self.share is not None or self.health is not None  # what belongs to this layer is done in it
        repeats, masked = use.repeats["both" if keep else "fprop"], learns and use.masks
        key = (self.op, use.first, use.second, use.rotations, dtype, keep, masked)
        if operand == "activation" and repeats and not alone:
            return made_once(x, key, self.reader, lambda: self._quantize_forward(operand, x, dtype, keep, masked))
        if operand == "weight" and repeats and self.kept is not None and self.health is None and _is_parameter(x):
            key = (*key, x.data_ptr(), x.shape, x.stride())
            if key not in self.kept:
                self.kept[key] = self._quantize_forward(operand, x, dtype, keep, masked)
            return self.kept[key]
        return self._quantize_forward(operand, x, dtype, keep, masked)

    def _quantize_forward(
        self, operand: str, x: Tensor, dtype: torch.dtype, keep: bool, masked: bool
    ) -> tuple[Operand, Stored]:
        use, other = self.uses.activation if operand == "activation" else self.uses.weight, None
        if keep and not use.same and not use.requantizes:
            # Before the first, which may change what a hindsight range remembers.
            other = self.quantize(use.gemm, operand, x, dtype, packed=True, again=use.first is not None)[1]
        found, stored = self.quantize("fprop", operand, x, dtype, packed=keep and use.same, masked=masked)
        if keep and use.requantizes:
            exact = self._unrotated(operand, found.dequantized())
            other = self.quantize(use.gemm, operand, exact, dtype, packed=True, again=True)[1]
        return found, other._replace(mask=stored.mask) if other else stored

    def quantize_gradient(self, g: Tensor, dtype: torch.dtype) -> tuple[Operand, Operand]:
        """The gradient for dgrad and for wgrad; the same object where one serves both.

        With N samples an operand is the sum of N draws' codes, its scale divided by N: one GEMM gives the average of
        the N products (SMP). The first draw serves both GEMMs where they encode alike.
        """
        if self.health is not None:
            self.health["gradient_exponents"] = exponent_counts(g)
        for_dgrad, for_wgrad = self.dgrad.gradient, self.wgrad.gradient
        if self.uses.gradients_same:
            one, _ = self.quantize("dgrad", "gradient", g, dtype)
            first = self._average("dgrad", g, one)
            alike = for_dgrad is None or for_dgrad.samples == for_wgrad.samples
            return first, first if alike else self._average("wgrad", g, one)
        # wgrad before dgrad, which may change what a hindsight range remembers
        again = for_dgrad is not None
        other, _ = self.quantize("wgrad", "gradient", g, dtype, again=again)
        one, _ = self.quantize("dgrad", "gradient", g, dtype)
        return self._average("dgrad", g, one), self._average("wgrad", g, other, again)

    def _average(self, gemm: str, g: Tensor, one: Operand, again: bool = False) -> Operand:
        """`one` and the further samples of the quantizer. again: as in `quantize`."""
        quantizer = getattr(self, gemm).gradient
        if quantizer is None or quantizer.samples == 1:
            return one
        (total,), scale, signed = one
        stream = self._stream(gemm, "gradient", quantizer, again)
        g = self._rotated(gemm, "gradient", g)
        if quantizer.block is not None:
            g, _, grid = self._in_blocks(gemm, "gradient", g, quantizer)
            total = total.to(torch.float32, copy=True)
            for sample in range(1, quantizer.samples):
                total += quantizer.run_blocks(g, stream, grid, torch.float32, share=self.share, sample=sample).values
            scale = total.new_ones(()) if scale is None else scale
            return Operand((total,), scale / quantizer.samples)
        limit = quantizer.samples * max(quantizer.form.limit, quantizer.form.unsigned_limit)
        further = (
            quantizer.encode(g, scale, signed, stream, sample, total.dtype) for sample in range(1, quantizer.samples)
        )
        if total.dtype == torch.int8 and limit > EXACT[torch.int8] and quantizer.samples <= MAX_INT8_DRAWS:
            draws = total, *further
        else:
            total = total.to(total.dtype if limit <= EXACT[total.dtype] else torch.float32, copy=True)
            for codes in further:
                total += codes
            draws = (total,)
        return Operand(draws, scale / quantizer.samples, signed)


def _is_parameter(x: Tensor) -> bool:
    """Whether x is a parameter or part of one, and not computed from some, in memory that others may get next."""
    return isinstance(x if x._base is None else x._base, nn.Parameter)


def exponent_counts(x: Tensor) -> Tensor:
    """How many elements of x have each float32 exponent: int64 (256,), bin e for 2^(e - 127) <= |x| < 2^(e - 126)."""
    exponents = (x.detach().float().reshape(-1).contiguous().view(torch.int32) >> 23) & 0xFF
    return torch.bincount(exponents, minlength=256)
