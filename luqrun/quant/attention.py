"""Multi-head attention whose projections run on codes."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luqrun.errors import TensorError, UserError
from luqrun.internals.of_torch import has_one_projection
from luqrun.quant.gemms import LinearOp
from luqrun.quant.layers import QuantLayer, as_leaf
from luqrun.quant.recipe import Recipe


class QuantMultiheadAttention(QuantLayer, nn.MultiheadAttention):
    """nn.MultiheadAttention whose projections are linear layers on codes.

    The packed input projection is one layer (one scale for the weights of query, key and value); out_proj is a
    QuantLinear of its own. The attention products stay in high precision: the paper quantizes layers.
    """

    @classmethod
    def from_module(cls, module: nn.MultiheadAttention, recipe: Recipe, seed: int, index: int):
        if not has_one_projection(module) or module.bias_k is not None or module.add_zero_attn:
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
        masks = {"key_padding_mask": key_padding_mask, "attn_mask": attn_mask}
        options = {"need_weights": need_weights, "average_attn_weights": average_attn_weights, "is_causal": is_causal}
        node = as_leaf(self, query, key, value, **masks, **options)
        if node is not None:
            return node
        if is_causal and attn_mask is None:
            raise TensorError("is_causal=True needs attn_mask, as in nn.MultiheadAttention")
        self._check_shapes(query, key, value)
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
        mask = self._mask(attn_mask, key_padding_mask, q, k)
        dropout = self.dropout if self.training else 0.0
        if need_weights:
            scores = q @ k.transpose(-2, -1) / self.head_dim**0.5
            weights = (scores if mask is None else scores + mask).softmax(-1)
            weights = F.dropout(weights, dropout) if dropout else weights
            attended = weights @ v
            weights = weights.mean(-3) if average_attn_weights else weights
        else:
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
            weights = None
        attended = attended.transpose(-3, -2).flatten(-2)
        if batched and not self.batch_first:
            attended = attended.transpose(0, 1)
        return self.out_proj(attended), weights

    def _check_shapes(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Raise UserError unless the three are sequences, alike in all but their lengths."""
        batch = 0 if self.batch_first else 1
        fit = query.dim() in (2, 3) and key.dim() == value.dim() == query.dim()
        fit = fit and query.shape[-1] == key.shape[-1] == value.shape[-1] == self.embed_dim
        fit = fit and key.shape[:-1] == value.shape[:-1]
        if not fit or (query.dim() == 3 and query.shape[batch] != key.shape[batch]):
            shapes = ", ".join(str(tuple(x.shape)) for x in (query, key, value))
            raise TensorError(
                f"attention takes query, key and value of one batch (or none) and {self.embed_dim} features, the "
                f"last two of one length, not {shapes}"
            )

    def _mask(self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
        """Both masks as one additive mask that broadcasts against (..., heads, length, source).

        TensorError for masks of other types and shapes than nn.MultiheadAttention takes.
        """
        *batch, _, length, _ = q.shape
        source, total = k.shape[-2], None
        plain, per_head = (length, source), (math.prod(batch) * self.num_heads, length, source)
        for name, mask, allowed in (
            ("attn_mask", attn_mask, (plain, per_head)),
            ("key_padding_mask", key_padding_mask, ((*batch, source),)),
        ):
            if mask is None:
                continue
            if mask.dtype != torch.bool and not mask.is_floating_point():
                raise TensorError(f"{name} is {mask.dtype}; allowed: bool (True: not attended) or floating (added)")
            if tuple(mask.shape) not in allowed:
                raise TensorError(f"{name} is {tuple(mask.shape)}; allowed: {' or '.join(map(str, allowed))}")
            if mask.dtype == torch.bool:
                mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(mask, -torch.inf)
            if name == "key_padding_mask":
                mask = mask[..., None, None, :]
            elif mask.dim() == 3:
                mask = mask.view(*q.shape[:-2], *mask.shape[-2:])
            total = mask if total is None else total + mask
        if total is None:
            return None
        # As its two ways to compute take together; autocast makes them one.
        if total.dtype not in (q.dtype, torch.float32) and not torch.is_autocast_enabled(q.device.type):
            shown = f"masks of {total.dtype} do not go with {q.dtype}; allowed: bool, {q.dtype} or float32"
            raise TensorError(shown.replace("torch.", ""))
        return total.to(q.dtype)
