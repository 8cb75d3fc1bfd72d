"""Which layers of a model are its first and its last: who feeds whom, traced with torch.fx or observed in a forward.

A label is a bit set, carried by a value: the layers it came through, and whether it depends on the model's input.
"""

from __future__ import annotations

import inspect
import random
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from luqrun.errors import UserError
from luqrun.internals.of_torch import tree_leaves

# torch's own transformers look at their input's dimensions, which fx cannot trace: a chain of their layers instead.
CHAINS = (
    *(nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.TransformerDecoder, nn.TransformerDecoderLayer),
    *(nn.Transformer, nn.MultiheadAttention),
)
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
LOOKUPS = (F.embedding, F.embedding_bag)  # where a weight is looked up; one that is tied to it is multiplied elsewhere


class Ends(NamedTuple):
    """Names of the first and the last layers, and how they were found."""

    first: tuple[str, ...]
    last: tuple[str, ...]
    how: str


class Label(NamedTuple):
    """Of a value: the layers it came through and the input, as bits; and of weights alone, whose weights they are."""

    flow: int = 0
    weights: int = 0


class Flow:
    """Who feeds whom among `names`, one bit each; the bits above them are the model's input, and the same where it came
    through none of them.

    Of a layer in a loop, the first call says what feeds it (`sees`), and the last call what it feeds (`feeds`).
    embeddings: those of the names that are no layer which a first one must not come after.
    """

    def __init__(self, names: Sequence[str], embeddings: Sequence[str] = ()):
        self.names, self.reached, self.direct = list(names), 1 << len(names), 2 << len(names)
        self.input = self.reached | self.direct
        self.bits = {name: 1 << number for number, name in enumerate(names)}
        self.tables = sum(self.bits[name] for name in embeddings)
        self.sees: dict[int, int] = {}
        self.feeds: dict[int, int] = {}
        self.result = 0

    def through(self, layers: int, flow: int) -> int:
        """What comes out of `layers`, side by side, when `flow` goes in."""
        for bit in self._split(layers):
            self.sees.setdefault(bit, flow)
            self.feeds[bit] = 0
        for bit in self._split(flow & ~self.input & ~layers):
            self.feeds[bit] |= layers
        return (flow & ~self.direct if layers else flow) | layers

    @staticmethod
    def _split(bits: int) -> Iterator[int]:
        while bits:
            lowest = bits & -bits
            yield lowest
            bits ^= lowest

    def chain(self, layers: Sequence[str], flow: int) -> int:
        """What comes out of `layers`, one after the other."""
        for name in layers:
            flow = self.through(self.bits[name], flow)
        return flow

    def operation(self, labels: Sequence[Label]) -> Label:
        """The label of a result of values with `labels`. Weights meet data in the operation that multiplies them."""
        flow, weights = 0, 0
        for label in labels:
            flow, weights = flow | label.flow, weights | label.weights
        return Label(self.through(weights, flow)) if flow and weights else Label(flow, weights)

    def ends(self, how: str) -> Ends:
        """First: the input itself reaches it, and no other layer but embeddings does. Last: it reaches the result, and
        no other that does."""
        seen = {name: self.sees.get(bit, 0) & ~self.tables for name, bit in self.bits.items()}
        first = [name for name, flow in seen.items() if flow == self.input]
        used = {name: bit for name, bit in self.bits.items() if bit & self.result}
        last = [name for name, bit in used.items() if not self.feeds[bit] & self.result]
        if not first or not last:
            raise ValueError("no layer lies between the input and the result")
        return Ends(tuple(first), tuple(last), how)


def find_ends(model: nn.Module, layers: dict[str, nn.Module], names: Sequence[str], example=None) -> Ends:
    """The first and last of `layers`, all that multiply by weights, and embeddings. First is a layer that the model's
    input itself reaches, and beside it nothing that came through another layer but an embedding; last one whose output
    reaches the model's through no other: several where a network branches.

    example: the input (a tensor, a tuple of arguments, or a dict of keywords) of an evaluation forward that shows it;
    else torch.fx traces the model. Where fx cannot, the first and last of `names` by registration.
    """
    if example is not None:
        try:
            return _observe(model, layers, example)
        except Exception as error:
            raise UserError(f"example=: the model cannot be followed with it ({_brief(error)})") from error
    try:
        return _trace(model, layers)
    except Exception as error:  # whatever a forward does to proxies
        why = f"by registration, since torch.fx cannot trace the model ({_brief(error)}); example= would show it"
        return Ends(tuple(names[:1]), tuple(names[-1:]), why)


def _flow(layers: dict[str, nn.Module]) -> Flow:
    return Flow(list(layers), [name for name, layer in layers.items() if isinstance(layer, EMBEDDINGS)])


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"


class _Tracer(fx.Tracer):
    """Traces down to the layers, and past what holds none of them."""

    proxy_buffer_attributes = True  # else `self.counter += 1` would count

    def __init__(self, layers: dict[str, nn.Module]):
        super().__init__()
        self.ids = {id(layer) for layer in layers.values()}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        inside = any(id(each) in self.ids for each in m.modules() if each is not m)
        return isinstance(m, CHAINS) or not inside


def _trace(model: nn.Module, layers: dict[str, nn.Module]) -> Ends:
    if isinstance(model, CHAINS) or "forward" in vars(model):
        raise TypeError("its forward is not its class's to trace")
    parameters = inspect.signature(model.forward).parameters.values()
    defaults = {each.name: each.default for each in parameters if each.default is not each.empty}
    with _untouched(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in model.modules():
            module.training = True  # heads that only train are layers too
        graph = _Tracer(layers).trace(model, concrete_args=defaults)
    flow, labels = _flow(layers), {}
    name_of = {id(layer): name for name, layer in layers.items()}
    for node in graph.nodes:
        label = flow.operation([labels[each] for each in node.all_input_nodes])
        if node.op == "placeholder":
            label = Label(flow.input)
        elif node.op == "get_attr":
            owner = name_of.get(id(model.get_submodule(node.target.rpartition(".")[0])))
            label = Label(0, flow.bits.get(owner, 0))
        elif node.op == "call_module":
            inside = model.get_submodule(node.target).modules()
            called = [name_of[id(each)] for each in inside if id(each) in name_of]
            label = Label(flow.chain(called, label.flow))
        elif node.op == "output":
            flow.result = label.flow
        labels[node] = label
    return flow.ends("as traced by torch.fx")


class _Observer(TorchFunctionMode):
    """Labels the tensors of a forward, operation by operation."""

    def __init__(self, flow: Flow, layers: dict[str, nn.Module]):
        super().__init__()
        self.flow, self.labels, self.weights, self.tables = flow, {}, {}, {}
        for name, layer in layers.items():
            of = self.tables if isinstance(layer, EMBEDDINGS) else self.weights
            for weight in (*layer.parameters(recurse=False), *layer.buffers(recurse=False)):
                of[id(weight)] = of.get(id(weight), 0) | flow.bits[name]

    def put(self, tensor: Tensor, label: Label) -> None:
        if id(tensor) not in self.weights and id(tensor) not in self.tables:
            self.labels[id(tensor)] = (weakref.ref(tensor), label)

    def get(self, tensor: Tensor) -> Label:
        reference, label = self.labels.get(id(tensor), (None, Label()))
        alive = reference is not None and reference() is tensor  # an id is used again
        return label if alive else Label(0, self.weights.get(id(tensor), 0) or self.tables.get(id(tensor), 0))

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        labels = [self.get(each) for each in given]
        if func in LOOKUPS:
            table = sum({self.tables.get(id(each), 0) for each in given})
            labels = [*(Label(label.flow) for label in labels), Label(0, table)]
        if func is F.multi_head_attention_forward:  # reads out_proj's weight too
            weights = [name for name, bit in self.flow.bits.items() if any(label.weights & bit for label in labels)]
            label = Label(self.flow.chain(weights, self.flow.operation([Label(each.flow) for each in labels]).flow))
        else:
            label = self.flow.operation(labels)
        changed = [each for each in tree_leaves(result) if isinstance(each, Tensor)]
        if result is None and given:  # such as x[0] = y
            changed = given[:1]
        for each in changed:
            self.put(each, label)
        return result


def _observe(model: nn.Module, layers: dict[str, nn.Module], example) -> Ends:
    args = () if isinstance(example, dict) else tuple(example) if isinstance(example, tuple | list) else (example,)
    kwargs = example if isinstance(example, dict) else {}
    flow = _flow(layers)
    observer = _Observer(flow, layers)
    for each in tree_leaves((args, kwargs)):
        if isinstance(each, Tensor):
            observer.put(each, Label(flow.input))
    devices = sorted({each.device.index for each in model.parameters() if each.is_cuda})
    with _untouched(model, buffers=True), torch.no_grad(), torch.random.fork_rng(devices):
        model.eval()
        with observer:
            result = model(*args, **kwargs)
    for each in tree_leaves(result):
        if isinstance(each, Tensor):
            flow.result |= observer.get(each).flow
    return flow.ends("as observed in a forward of the example")


@contextmanager
def _untouched(model: nn.Module, buffers: bool = False) -> Iterator[None]:
    """Undo what a forward does to the modules' attributes (one container deep), random states and `buffers`."""
    attributes = [(module, dict(vars(module))) for module in model.modules()]
    containers = [
        (value, value.copy())
        for _, saved in attributes
        for value in saved.values()
        if isinstance(value, list | dict | set)
    ]
    tensors = [(each, each.detach().clone()) for each in model.buffers() if buffers and not each.is_meta]
    python, default = random.getstate(), torch.get_rng_state()
    try:
        yield
    finally:
        for module, saved in attributes:
            vars(module).clear()
            vars(module).update(saved)
        for value, saved in containers:
            value.clear()
            (value.extend if isinstance(value, list) else value.update)(saved)
        with torch.no_grad():
            for tensor, saved in tensors:
                if not torch.equal(tensor, saved):
                    tensor.copy_(saved)
        random.setstate(python)
        torch.set_rng_state(default)
