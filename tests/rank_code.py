"""What the processes of tests/runtime/test_process_group.py do: each leaves its findings in a folder."""

import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import running
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import luqrun
from luqrun import tasks
from luqrun.config import DatasetConfig
from luqrun.quant.convert import set_shared_ranges
from luqrun.quant.layers import over_processes
from luqrun.quant.quantizer import Quantizer
from luqrun.quant.recipe import Recipe
from luqrun.runs.folder import RunFolder
from luqrun.runtime import process_group
from luqrun.train import trainer
from luqrun.train.evaluation import evaluate

QUANTIZERS = {
    "absmax": Quantizer("e3m0"),
    "sawb": Quantizer("int4", range="sawb"),
    "two-sided": Quantizer("int4"),
}
NEAREST = Recipe.of("nearest", weight=QUANTIZERS["sawb"], activation=QUANTIZERS["sawb"], gradient=QUANTIZERS["absmax"])
HINDSIGHT = Recipe.of("hindsight", gradient=Quantizer("e3m0", range="hindsight", rounding="stochastic"))
# 10 batches an epoch for one, two and three processes; 94 validation images are no multiple of any of them.
RUN = ("dataset.batch_size=24", "model=vit_tiny", "quant=fp32", "tracking.health_every=4")


EVALUATED = ("dataset.batch_size=12", "quant=forward_sr", "dataset.glyphs.val_images=188")


def whole() -> torch.Tensor:
    """A tensor of which each process has a part; only the last row has the maximum, and negative values."""
    x = torch.randn(12, 64, generator=torch.Generator().manual_seed(1)).abs()
    x[-1] *= -3
    return x


def part(x: torch.Tensor) -> torch.Tensor:
    return x[process_group.rank() :: process_group.world_size()].clone()


def linear(recipe: Recipe) -> nn.Module:
    torch.manual_seed(0)
    return luqrun.quantize_model(nn.Linear(64, 32), recipe, skip=())


def one_pass(layer: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The output, and the gradient of x where that of the output is the output times its row's mean."""
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(y.detach() * x.detach().mean(1, keepdim=True))
    return y.detach(), x.grad


def statistics():
    return {name: each.measure(part(whole()), share=over_processes) for name, each in QUANTIZERS.items()}


def shared_ranges():
    layer = linear(NEAREST)
    own = one_pass(layer, part(whole()))
    set_shared_ranges(layer, True)
    return own, one_pass(layer, part(whole()))


def hindsight():
    """The same gradient in all processes, then rank + 1 times as much."""
    layer, x = linear(HINDSIGHT), whole()
    gradient = torch.randn(12, 32, generator=torch.Generator().manual_seed(2))
    found = []
    for factor in (1.0, process_group.rank() + 1.0):
        layer.zero_grad()
        layer(x).backward(gradient * factor)
        found.append((layer.weight.grad.clone(), layer.gradient_hindsight.clone()))
    return gradient.abs().max(), found


def stochastic_forward():
    """The weight's codes of a training forward, seen through an activation of ones, and the output of another."""
    layer = linear(Recipe.of("stochastic", weight=Quantizer("int4", rounding="stochastic")))
    noisy = linear(Recipe.of("stochastic", activation=Quantizer("int4", rounding="stochastic")))
    return layer(torch.eye(64)).detach(), noisy(whole()).detach()


def evaluated(folder: Path):
    """What an untrained network with a stochastic forward answers to the validation images."""
    with running.quiet_machine(folder / f"cache{process_group.rank()}"):
        return evaluate(running.build_trainer(folder / f"evaluated{process_group.rank()}", *EVALUATED))


def sharded():
    """One step of SGD on a quantized model, its parameters sharded (FSDP2); the gathered weights, and the codes' count.

    The reference is the same step with whole parameters, the gradients averaged by hand.
    """
    weights = []
    for shard in (True, False):
        torch.manual_seed(0)
        model = luqrun.quantize_model(nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10)), NEAREST, skip=())
        if shard:
            for layer in (model[0], model[2], model):
                fully_shard(layer, mesh=dist.device_mesh.init_device_mesh("cpu", (process_group.world_size(),)))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(part(whole())).square().mean().backward()
        if not shard:
            for parameter in model.parameters():
                dist.all_reduce(parameter.grad)
                parameter.grad /= process_group.world_size()
        optimizer.step()
        weights.append([each.full_tensor() if shard else each.detach() for each in model.parameters()])
    return [[each.detach().clone() for each in found] for found in weights]


def labelled(path: Path):
    """Of a task whose batches weigh differently: the gradient of 12 words in two micro-batches, and an evaluation.

    The words are sorted by their lengths, and each process has others: its every micro-batch has a weight of its own.
    """
    path.mkdir()
    config = replace(running.tiny("quant=fp32"), dataset=DatasetConfig(name="words", batch_size=6))
    run = trainer.Trainer(config, RunFolder(path), torch.device("cpu"))
    words = run.data.train
    order = (words.labels >= 0).sum(1).argsort().numpy()[::5][:12]
    own = np.array_split(order, process_group.world_size())[process_group.rank()]
    run.accumulate_gradients([words.batch(each, None) for each in np.array_split(own, 2)], record_health=False)
    run.tracker.close()
    return torch.cat([each.grad.flatten() for each in run.model.parameters()]), evaluate(run)


def trained(folder):
    path = folder / "run"
    if process_group.is_first():
        path.mkdir()
    dist.barrier()
    with running.quiet_machine(folder / f"cache{process_group.rank()}"):
        summary = trainer.run(running.tiny(*RUN), RunFolder(path, writes=process_group.is_first()))
    return {name: value for name, value in summary.items() if name.startswith("val/")}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    tasks.MODULES["words"] = "labelling"
    process_group.join()
    found = {each.__name__: each() for each in (statistics, shared_ranges, hindsight, stochastic_forward, sharded)}
    found["trained"], found["evaluated"] = trained(folder), evaluated(folder)
    found["labelled"] = labelled(folder / f"labelled{process_group.rank()}")
    found["gathered"] = process_group.gather({"rank": process_group.rank()})
    found["sums"] = (
        process_group.all_reduce_sum([1.0, process_group.rank()]),
        process_group.all_reduce_max(process_group.rank()),
    )
    found["told"] = process_group.run_on_first(lambda: f"by {process_group.rank()}")
    torch.save(found, folder / f"{process_group.rank()}.pt")
    process_group.leave()
    # Not the interpreter's way out: after FSDP, torch 2.14 now and then aborts while its threads are torn down.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
