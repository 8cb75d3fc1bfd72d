"""What luqrun asks of torch through interfaces that it does not promise; test_of_torch.py probes each."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode as DispatchMode  # noqa: F401 for others
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_leaves  # noqa: F401 for others
from torch.utils.checkpoint import CheckpointPolicy, _CachingTorchDispatchMode

# Their memory is what it seems. A subclass may have none of its own (jagged, DTensor, FakeTensor).
PLAIN = (Tensor, nn.Parameter)
_CHECKPOINT_FILE = torch.utils.checkpoint.__file__
_REENTRANT = torch.utils.checkpoint.CheckpointFunction.backward.__code__
_CALL = nn.Module._call_impl.__code__


def int_mm(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """The product of two int8 matrices in int32."""
    return torch._int_mm(a, b) if out is None else torch._int_mm(a, b, out=out)


def with_shape(x: Tensor, shape: Sequence[int]) -> Tensor:
    """x in another shape, over the same memory, and no view: autograd forbids in-place work on views that leave a
    Function."""
    return torch.ops.aten._unsafe_view(x, shape)


def is_view(x: Tensor) -> bool:
    """Whether autograd knows x as a view of another tensor."""
    return x._is_view()


def padding_of_each_side(conv: nn.Conv2d) -> list[int]:
    """What F.pad takes for the padding of a convolution, `same` included."""
    return conv._reversed_padding_repeated_twice


def has_one_projection(attention: nn.MultiheadAttention) -> bool:
    """Whether query, key and value have as many features, and one weight for their projections."""
    return attention._qkv_same_embed_dim


def forget_compiled_call(module: nn.Module) -> bool:
    """Undo module.compile(); whether there was anything to undo."""
    compiled = module._compiled_call_impl is not None
    module._compiled_call_impl = None
    return compiled


def has_vnni() -> bool | None:
    """Whether this CPU multiplies int8 codes in units of its own; None where this torch does not say."""
    asked = getattr(torch.cpu, "_is_vnni_supported", None)
    return None if asked is None else asked()


def prepack_conv(weight: Tensor, ones: Tensor, stride: tuple[int, int]) -> Tensor:
    """An int8 weight (K, C, R, S) as oneDNN's convolution wants it; ones: float32 (K,), its scales."""
    return torch.ops.onednn.qconv_prepack(weight, ones, 1.0, 0, stride, (0, 0), (1, 1), 1, None)


def conv_of_codes(images: Tensor, packed: Tensor, ones: Tensor, zeros: Tensor, stride: tuple[int, int]) -> Tensor:
    """oneDNN's convolution of uint8 (N, C, H, W) with a weight from `prepack_conv`, without padding: float32 sums."""
    how = packed, ones, zeros, None, stride, (0, 0), (1, 1), 1, 1.0, 0, torch.float32, "none", [], None
    return torch.ops.onednn.qconv2d_pointwise(images, 1.0, 0, *how)


def allow_recompilations(limit: int) -> None:
    """Let torch.compile compile one function at least so often: layers share theirs."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, limit)


def compilations() -> int:
    """How often torch.compile has begun to compile something in this process."""
    module = sys.modules.get("torch._dynamo.utils")
    return 0 if module is None else module.counters["frames"]["total"]


def of_any_size(x: Tensor) -> None:
    """Let torch.compile, where it first meets x, make code for other sizes of its dimensions too; not of those of 1."""
    for dimension in range(x.dim()):
        torch._dynamo.maybe_mark_dynamic(x, dimension)


def compiler_errors() -> tuple[type[Exception], ...]:
    """What torch.compile raises where it cannot trace, or finds no working C++ compiler."""
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    return TorchDynamoException, CppCompileError, InvalidCxxCompiler


def in_backward() -> bool:
    """Whether this thread is inside a backward pass."""
    return torch._C._current_graph_task_id() != -1


def has_modes() -> bool:
    """Whether a dispatch mode sees, and may keep, what operators return."""
    return torch._C._len_torch_dispatch_stack() > 0


def is_watched() -> bool:
    """Whether somebody must see each operator: a compiler, torch.jit.trace, a dispatch mode or the profiler."""
    return (
        torch.compiler.is_compiling()
        or has_modes()
        or torch.jit.is_tracing()
        or torch.autograd.profiler._is_profiler_enabled
    )


def is_lazy(x: Tensor) -> bool:
    """Whether x's memory holds something else than its elements: their negatives (torch._neg_view), or nothing (torch's
    zeros without memory). The dispatcher resolves both before an operator of ours."""
    return x.is_neg() or x._is_zerotensor()


def has_saved_hooks() -> bool:
    """Whether hooks see what is kept for a backward pass (torch.autograd.graph.saved_tensors_hooks), as those of
    activation checkpointing do in both forwards."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def is_transformed() -> bool:
    """Whether a transform of torch.func (grad, vmap, ...) is at work, whose tensors look plain and are not."""
    return torch._C._are_functorch_transforms_active()


def is_batched(gradient: Tensor) -> bool:
    """Whether what a backward pass is given stands for many gradients at once (is_grads_batched=True)."""
    return not torch._C._has_storage(gradient)


def has_tangent(x: Tensor) -> bool:
    """Whether forward-mode differentiation (torch.autograd.forward_ad) follows x."""
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None


def autograd_alone(x: Tensor) -> bool:
    """Whether autograd follows this plain tensor, and nothing else does: no compiler, tracer, dispatch mode, transform
    of torch.func or forward-mode derivative."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not x.requires_grad or type(x) not in PLAIN:
        return False
    return not (has_modes() or is_transformed() or has_tangent(x) or torch.jit.is_tracing())


def has_dispatch(x: Tensor) -> bool:
    """Whether x is of a class with __torch_dispatch__, which may wrap other tensors and have no memory itself.

    Not of torch's own without data (FakeTensor), for which operators have an answer.
    """
    if type(x) in PLAIN or type(x).__module__.startswith("torch._subclasses"):
        return False
    return type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__


def asks_for_values(error: Exception) -> bool:
    """Whether torch says so to who asks a tensor on the meta device, which has a shape alone, what it holds."""
    return re.search(r"\bmeta tensors?\b|register_meta|\bmeta device type\b", str(error), re.IGNORECASE) is not None


def keep_results(operator: str, library: torch.library.Library) -> None:
    """Have activation checkpointing keep what an operator returns, whatever its policy, where it decides by operator:
    with a context_fn, and under a compiler."""

    def dispatch(mode, func, types, args=(), kwargs=None):
        policy, mode.policy_fn = mode.policy_fn, lambda *_, **__: CheckpointPolicy.MUST_SAVE
        try:
            return mode.__torch_dispatch__(func, types, args, kwargs)
        finally:
            mode.policy_fn = policy

    torch.library.register_torch_dispatch(operator, _CachingTorchDispatchMode, dispatch, lib=library)


def flop_formulas() -> dict:
    """By operator (all its overloads), how many floating-point operations torch counts of it, of shapes alone: a
    function of its arguments and, as out_val, of its result."""
    from torch.utils.flop_counter import flop_registry  # half a second

    return flop_registry


def flop_counters() -> list[tuple[dict, Callable]]:
    """(formulas by operator, function that adds one) of torch.utils.flop_counter and of each counter at work, which
    has a copy; none where the module is not loaded."""
    module = sys.modules.get("torch.utils.flop_counter")
    if module is None:
        return []
    found = [(module.flop_registry, lambda operator, formula: module.register_flop_formula(operator)(formula))]
    for mode in _get_current_dispatch_mode_stack():
        if isinstance(mode, module._FlopCounterMode):
            own = mode.counter.flop_registry
            found.append((own, lambda operator, _, own=own: own.update({operator: module.flop_registry[operator]})))
    return found


def repeats_forward() -> tuple[bool, bool]:
    """(is repeated, counts) of a forward inside a backward pass: whether torch.utils.checkpoint runs it once more, and
    whether it is the pass with gradients of the reentrant kind, whose first pass had none.

    Other forwards there (an adjoint's, an implicit layer's) are not repeated.
    """
    if not in_backward():
        return False, True
    for frame in _frames():
        code = frame.f_code
        if code.co_name == "recompute_fn" and code.co_filename == _CHECKPOINT_FILE:
            return True, False
        if code is _REENTRANT:
            return True, True
    return False, True


def run_while_traced(function: Callable) -> Callable:
    """Let a compiler call `function` itself, once, where it would trace into it.

    torch.compiler.assume_constant_result, without loading the compiler.
    """
    function._dynamo_marked_constant = True
    return function


def outermost_module() -> nn.Module | None:
    """The module whose call contains all the others that are being called now in this thread."""
    found = None
    for frame in _frames():
        if frame.f_code is _CALL:
            found = frame
    return None if found is None else found.f_locals["self"]


def _frames() -> Iterator[FrameType]:
    """The callers, from the inside out."""
    frame = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def innermost(network: nn.Module) -> nn.Module:
    """The model inside of what DDP and torch.compile make of it, whose other methods they do not hand on."""
    while isinstance(network, DistributedDataParallel) or "_orig_mod" in network._modules:
        network = network.module if isinstance(network, DistributedDataParallel) else network._orig_mod
    return network
