"""From a config to the network that trains: model, recipe, device; and around it the compiler and the processes."""

from __future__ import annotations

import inspect
import logging
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from luqrun.config import Config
from luqrun.internals.of_torch import allow_recompilations, of_any_size
from luqrun.quant.convert import quantize_model, quantized_layers, set_shared_ranges, unchanged_weights
from luqrun.quant.finetune import Phase
from luqrun.quant.recipe import Recipe
from luqrun.runtime import process_group
from luqrun.tasks.task import Task
from luqrun.train.starting_weights import load_weights

log = logging.getLogger(__name__)


def build(config: Config, recipe: Recipe, task: Task, device: torch.device) -> nn.Module:
    """The network that a run's task trains, quantized, its weights those of model.weights or drawn from config.seed.

    Raises UserError for weights that do not fit.
    """
    torch.manual_seed(config.seed)
    model = quantize_model(task.network(), recipe, seed=config.seed, example=task.example(), fuse=config.fuse)
    if (weights := task.weights()) is not None:
        load_weights(model, weights, task.head(model), config.model.new_head)
    if process_group.world_size() > 1:
        set_shared_ranges(model, config.distributed.range == "global")
        if config.distributed.batch_norm == "sync":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    # channels_last halves the convolutions' backward pass on the CPU and is what tensor cores want.
    return model.to(device, memory_format=torch.channels_last)


def unchanging(model: nn.Module, off: bool) -> AbstractContextManager:
    """In here weights do not change. off: nobody need know, as where a compiled network's layers remember nothing."""
    return nullcontext() if off else unchanged_weights(model)


def log_model(model: nn.Module, config: Config, recipe: Recipe, steps: int | None = None) -> None:
    """Say what trains, and which layers are quantized; and warn of a warm-up that is not over when the schedule of
    `steps` steps is. steps: None where nothing is trained."""
    quantized = [name for name, _ in quantized_layers(model)]
    log.info("%s on %s, quant=%s: %s", config.model.name, config.dataset.name, config.quant.name, recipe)
    if quantized:
        skipped = ", ".join(config.quant.skip) or "none"
        log.info("%d quantized layers, %s to %s (skip: %s)", len(quantized), quantized[0], quantized[-1], skipped)
    for caveat in recipe.caveats:
        log.warning("quant=%s: %s", config.quant.name, caveat)
    if steps is None:
        return
    if quantized and config.finetune.epochs:
        _log_finetune(config, recipe)
    warmup = config.schedule.warmup_steps
    if warmup is not None and warmup >= steps:
        what = f"schedule.warmup_steps={warmup} is not less than the {steps} steps of the schedule"
        log.warning("%s: the learning rate never comes to schedule.lr=%g", what, config.schedule.lr)


def _log_finetune(config: Config, recipe: Recipe) -> None:
    name, operands = config.finetune.name, vars(config.finetune.high_precision)
    if not any(operands.values()):
        log.info("fine-tune %s: everything stays as quant=%s has it", name, config.quant.name)
        return
    if Phase.of(recipe, operands).training == recipe:
        what = f"finetune={name} changes nothing of quant={config.quant.name}"
        log.warning("%s: the recipe quantizes no operand that finetune.high_precision names", what)
        return
    shown = ", ".join(f"{gemm} ({', '.join(names)})" for gemm, names in operands.items() if names)
    log.info("fine-tune %s: high precision in %s; evaluated with the recipe's weights and activations", name, shown)


def wrap(model: nn.Module, config: Config, device: torch.device, any_size: bool) -> nn.Module:
    """What is called in place of `model`: itself, compiled, or averaging its gradients over the processes.

    any_size: whether hardly two batches have the same shape, so that a graph for the first one's would serve once.
    """
    network = model
    if config.compile:
        # Training, fine-tuning and evaluation are graphs of their own, for whole batches and for an epoch's last one.
        allow_recompilations(64)
        network = torch.compile(model)
        if any_size:
            network.register_forward_pre_hook(_mark_sizes, with_kwargs=True)
        log.info("compile=true: a step that compiles takes a minute or more, and is no part of the time of training")
    if process_group.world_size() == 1:
        return network
    # Buffers are not sent at each step: share_buffers does it where they are read. (Newer torch calls it otherwise.)
    known = inspect.signature(DistributedDataParallel).parameters
    each_step = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    devices = [device] if device.type == "cuda" else None
    # DDP would sort its buckets anew after a process' first step. What more than two processes add up depends on it in
    # the last bit, so that a resumed run would differ. This keeps them (torch warns that none is unused: harmless).
    fixed = {"find_unused_parameters": True, each_step: False}
    return DistributedDataParallel(network, device_ids=devices, gradient_as_bucket_view=True, **fixed)


def _mark_sizes(network: nn.Module, inputs: tuple, keywords: dict) -> None:
    for x in (*inputs, *keywords.values()):
        if isinstance(x, torch.Tensor):
            of_any_size(x)


def synchronizing(network: nn.Module, on: bool) -> AbstractContextManager:
    """Around a micro-batch: whether its backward pass averages gradients over the processes, as a step's last does."""
    return nullcontext() if on or not isinstance(network, DistributedDataParallel) else network.no_sync()


def eager(on: bool) -> AbstractContextManager:
    """In here nothing compiled runs, if `on`."""
    return torch.compiler.set_stance("force_eager") if on else nullcontext()


def autocast(config: Config, device: torch.device) -> AbstractContextManager:
    """Around what a network computes."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.precision == "bf16")


def share_buffers(model: nn.Module) -> None:
    """Give every process the first one's running statistics: each has those of its own examples."""
    process_group.broadcast(model.buffers())
