"""The matrix products of a network's forward pass, by layer, from shapes alone.

Every operation that reaches torch's dispatcher is seen, so that a product is counted wherever it stands in a forward;
the modules being called say whose it is. What the backward pass adds follows from which operands want a gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from luqrun.internals.of_torch import DispatchMode, flop_formulas
from luqrun.quant.convert import TWINS
from luqrun.quant.coverage import unquantized_layers

LAYER, ATTENTION, UNKNOWN = "layer", "attention product", "unknown"
IN_PROJ, OUT_PROJ = "in_proj", "out_proj"  # of nn.MultiheadAttention, as its parameters are called
aten = torch.ops.aten


@dataclass(frozen=True)
class Product:
    """`groups` independent products (rows, inner) x (inner, columns), one operation of a forward.

    layer: its name. kind: LAYER (activation x weight), ATTENTION (activation x activation) or UNKNOWN. wants: whether
    the gradient of the first operand (then the second) is computed, by a product of as many multiply-accumulates each.
    elements: of the first operand, the second and the result, as they lie in memory. source: names the tensor that is
    the first operand of a LAYER, -1 otherwise. what: of what is UNKNOWN, why. macs: None where even that is unknown.
    """

    layer: str
    kind: str
    groups: int
    rows: int
    inner: int
    columns: int
    wants: tuple[bool, bool]
    elements: tuple[int, int, int]
    source: int = -1
    what: str = ""
    known_macs: int | None = None

    @property
    def macs(self) -> int | None:
        """Multiply-accumulates of the forward pass."""
        return self.known_macs if self.kind == UNKNOWN else self.groups * self.rows * self.inner * self.columns


@dataclass(frozen=True)
class Outside:
    """What is no matrix product. kind: normalisation or embedding. elements: of its results; kept: of what its backward
    pass reads."""

    layer: str
    kind: str
    elements: int
    kept: int


@dataclass(frozen=True)
class Work:
    """A forward: its products in the order in which they run, and what else was seen."""

    products: tuple[Product, ...]
    outside: tuple[Outside, ...]


def observe(model: nn.Module, inputs: dict[str, object]) -> Work:
    """Run a training forward of a model with the layers of torch (not quantized), and note its work.

    inputs: keywords. Model and inputs may be on the meta device; then nothing is computed. Layers of a kind that is not
    understood are UNKNOWN, with the multiply-accumulates that torch's formulas give for the operations in them, or None
    where these know nothing of them.
    """
    watch = _Watch(model)
    # Attention as the two products that it is, and not as one operation.
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), watch.calls(), watch:
        model(**inputs)
    return Work(tuple(_named(watch.products, model) + watch.silent()), tuple(watch.outside))


class _Watch(DispatchMode):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.names = model, {id(module): name for name, module in model.named_modules()}
        self.unknown = {name: each.kind for name, each in unquantized_layers(model, TWINS).items()}
        self.stack: list[tuple[str, nn.Module, int]] = []
        self.sources: list[Tensor] = []  # held, or a later one could have an earlier one's id
        self.products: list[Product] = []
        self.outside: list[Outside] = []
        self.formulas = flop_formulas()

    @contextmanager
    def calls(self) -> Iterator[None]:
        """While in here, `stack` holds the modules being called."""
        handles = []
        for module in self.model.modules():
            handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
            handles.append(module.register_forward_hook(self._leave, with_kwargs=True, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, module: nn.Module, args, keywords) -> None:
        given = [each for each in (*args, *keywords.values()) if isinstance(each, Tensor)]
        source = next((at for at, each in enumerate(self.sources) if given and each is given[0]), len(self.sources))
        if given and source == len(self.sources):
            self.sources.append(given[0])
        self.stack.append((self.names[id(module)], module, source))

    def _leave(self, module: nn.Module, args, keywords, output) -> None:
        self.stack.pop()
        if not isinstance(output, Tensor):
            return
        kind = type(module).__name__.lower()
        if "norm" in kind:
            read = next(each for each in (*args, *keywords.values()) if isinstance(each, Tensor))
            self.outside.append(Outside(self.names[id(module)], "normalisation", output.numel(), read.numel()))
        elif isinstance(module, nn.Embedding | nn.EmbeddingBag):
            self.outside.append(Outside(self.names[id(module)], "embedding", output.numel(), 0))

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        name, module, source = self.stack[-1] if self.stack else ("", self.model, -1)
        packet = operator.overloadpacket
        found = _taken_apart(packet, args)
        if name in self.unknown or (found is None and packet in self.formulas):
            macs = self._by_formula(packet, args, kwargs, result)
            if macs is None:
                return result
            kind = self.unknown.get(name) or f"the operation {packet}"
            operands = [each for each in args if isinstance(each, Tensor)] if found is None else found[-2:]
            wanted = [each.requires_grad for each in operands]
            wants = any(wanted[:1]), any(wanted[1:2])
            sizes = [each.numel() for each in operands[:2]] + [0] * (2 - len(operands[:2]))
            whole = result if isinstance(result, Tensor) else result[0]
            elements = sizes[0], sizes[1], whole.numel()
            at = Product(name, UNKNOWN, 1, 1, macs, 1, wants, elements, what=kind, known_macs=macs)
            self.products.append(at)
        elif found is not None:
            *of, first, second = found
            kind, wants = _kind(module, packet), (first.requires_grad, second.requires_grad)
            what = "a product of matrices outside of layers" if kind == UNKNOWN else ""
            known = math.prod(of) if kind == UNKNOWN else None
            elements = first.numel(), second.numel(), result.numel()
            at = source if kind == LAYER else -1
            self.products.append(Product(name, kind, *of, wants, elements, at, what, known))
        return result

    def _by_formula(self, packet, args, kwargs, result) -> int | None:
        """Multiply-accumulates by torch's formula; None where it has none."""
        formula = self.formulas.get(packet)
        return None if formula is None else formula(*args, **(kwargs or {}), out_val=result) // 2

    def silent(self) -> list[Product]:
        """Layers of unknown kinds in which no operation was seen that torch has a formula for."""
        seen = {product.layer for product in self.products}
        # A module that holds others of which some were seen is a container: attention of another library, say.
        silent = [name for name in self.unknown if not any(_inside(each, name) for each in seen)]
        blank = 1, 0, 0, 0, (False, False), (0, 0, 0)
        return [Product(name, UNKNOWN, *blank, what=self.unknown[name]) for name in silent]


def _inside(name: str, outer: str) -> bool:
    return not outer or name == outer or name.startswith(f"{outer}.")


def _kind(module: nn.Module, packet) -> str:
    of_two_axes = packet in (aten.mm, aten.addmm, aten.convolution)
    if isinstance(module, nn.MultiheadAttention):
        return LAYER if of_two_axes else ATTENTION
    if type(module) in TWINS:
        return LAYER
    return UNKNOWN if of_two_axes else ATTENTION


def _taken_apart(packet, args) -> tuple[int, int, int, int, Tensor, Tensor] | None:
    """(groups, rows, inner, columns, first, second) of an operation that is a product; None of one that is none, or is
    not understood."""
    if packet in (aten.mm, aten.bmm, aten.addmm, aten.baddbmm):
        first, second = args[-2:] if packet in (aten.mm, aten.bmm) else args[1:3]
        *groups, rows, inner = first.shape
        return math.prod(groups), rows, inner, second.shape[-1], first, second
    if packet is aten.convolution and not args[6]:  # not transposed
        images, weight, groups = args[0], args[1], args[8]
        pixels = math.prod(_out_sizes(args))
        inner, columns = math.prod(weight.shape[1:]), weight.shape[0] // groups
        return groups, images.shape[0] * pixels, inner, columns, images, weight
    return None


def _out_sizes(args) -> list[int]:
    """Pixels of a convolution's result along each axis."""
    images, weight, _, strides, paddings, dilations = args[:6]
    ends = zip(images.shape[2:], weight.shape[2:], strides, paddings, dilations, strict=True)
    return [(size + 2 * padding - far * (tap - 1) - 1) // stride + 1 for size, tap, stride, padding, far in ends]


def _named(products: list[Product], model: nn.Module) -> list[Product]:
    """Products of nn.MultiheadAttention by the name of their projection: the last one is of the output."""
    modules, found = dict(model.named_modules()), list(products)
    for name, module in modules.items():
        if isinstance(module, nn.MultiheadAttention):
            own = [at for at, each in enumerate(found) if each.layer == name and each.kind == LAYER]
            for at in own:
                part = OUT_PROJ if at == own[-1] else IN_PROJ
                source = -1 if part == OUT_PROJ else found[at].source
                found[at] = replace(found[at], layer=f"{name}.{part}".lstrip("."), source=source)
    return found
