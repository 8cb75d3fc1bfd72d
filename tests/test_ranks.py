"""Quantized layers in two gloo processes: one hindsight maximum for all ranks, and draws of their own."""

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import luqrun
from luqrun.quantizer import Quantizer
from luqrun.recipes import Recipe

HINDSIGHT = Quantizer("e3m0", range="hindsight", rounding="stochastic")


def train(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.manual_seed(0)
    layer = luqrun.quantize_model(nn.Linear(64, 64), Recipe("hindsight", gradient=HINDSIGHT), skip=())
    x = torch.randn(32, 64)
    gradient = torch.randn(32, 64)
    found = []
    for scale in (1.0, float(rank + 1)):  # the same gradient on both ranks, then twice as much on the second
        layer.zero_grad()
        layer(x).backward(gradient * scale)
        found.append((layer.weight.grad.clone(), layer.gradient_hindsight.clone()))
    torch.save((gradient.abs().max(), found), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_ranks_share_the_maximum_and_draw_apart(tmp_path):
    mp.spawn(train, args=(str(tmp_path),), nprocs=2)
    (maximum, first), (_, second) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    # Step 0: the same gradient and scale, so only the draws can differ.
    assert not torch.equal(first[0][0], second[0][0])
    assert first[0][1] == second[0][1] == maximum
    # Step 1: both learn the larger maximum (Eq. 18 with eta 0.1).
    assert first[1][1] == second[1][1]
    torch.testing.assert_close(first[1][1], 0.9 * 2 * maximum + 0.1 * maximum)
