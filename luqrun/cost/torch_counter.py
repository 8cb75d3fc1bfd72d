"""The same work by torch's own counter, to compare with."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from luqrun.cost.products import LAYER, Product
from luqrun.internals.of_torch import tree_leaves


def counted_by_torch(model: nn.Module, inputs: dict[str, object]) -> tuple[int, int]:
    """Multiply-accumulates of a forward and of its backward pass by torch.utils.flop_counter, which counts two
    operations each. On the meta device nothing is computed."""
    from torch.utils.flop_counter import FlopCounterMode  # half a second

    with sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
        with FlopCounterMode(display=False) as forward:
            result = model(**inputs)
        floats = [each for each in tree_leaves(result) if isinstance(each, Tensor) and each.requires_grad]
        with FlopCounterMode(display=False) as backward:
            sum(each.float().sum() for each in floats).backward()
    for parameter in model.parameters():
        parameter.grad = None
    return forward.get_total_flops() // 2, backward.get_total_flops() // 2


def as_torch_counts(products: Iterable[Product]) -> tuple[int, int]:
    """Our count as torch's: it takes the weight's gradient of a convolution in G groups for G times as much as it is
    (that of a whole convolution, most of which is thrown away)."""
    forward = backward = 0
    for product in products:
        macs = product.macs or 0
        forward += macs
        grouped = product.groups if product.kind == LAYER else 1
        backward += macs * product.wants[0] + macs * product.wants[1] * grouped
    return forward, backward
