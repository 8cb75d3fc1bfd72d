"""What scripts/hardware.py shows of the multiplier without multiplications: products, GEMMs and a training."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from luqrun.quant.formats import get_format
from luqrun.quant.kernels import mfbprop

SHAPES = ((1, 1, 1), (7, 300, 5), (64, 33, 17), (3, 5000, 2))  # rows, inner, columns of random GEMMs
TRAINING = (
    *("dataset.glyphs.train_images=64", "dataset.glyphs.val_images=94", "dataset.batch_size=16"),
    *("schedule.epochs=1", "finetune=none", "device=cpu"),
)


def products(signed: bool) -> dict:
    """All products: of pairs of 4-bit fields, or of unsigned integers and FP4 codes."""
    integer, other = get_format(mfbprop.INTEGER), get_format(mfbprop.LOGARITHMIC)
    fields = torch.arange(16)
    codes = torch.tensor(other.levels()) if not signed else other.from_fields(fields, torch.tensor(True)).int()
    integers = integer.from_fields(fields, torch.tensor(signed)).int()
    logarithms = other.to_fields(codes) if not signed else fields
    words = mfbprop.products(fields[:, None], logarithms[None], signed)
    exact = integers[:, None] * codes[None]
    magnitudes = torch.unique(exact[exact != 0].abs())
    lowest = magnitudes & -magnitudes  # FP7 holds what has no more than three bits from the first to the last
    wide = magnitudes // lowest >= 8
    return {
        "products": words.numel(),
        "exact": torch.equal(mfbprop.values(signed)[words.long()], exact.int()),
        "magnitudes": len(magnitudes),
        "do_not_fit": int(wide.sum()),
    }


def equal_gemms() -> list[bool]:
    """Whether each of some GEMMs of random codes, signed and unsigned, is the integer one."""
    generator, found = torch.Generator().manual_seed(0), []
    for signed in (True, False):
        levels = [torch.tensor(get_format(mfbprop.INTEGER).levels(signed)), _logarithms()]
        for rows, inner, columns in SHAPES:
            first, second = (
                each[torch.randint(len(each), shape, generator=generator)]
                for each, shape in zip(levels, ((rows, inner), (inner, columns)), strict=True)
            )
            found.append(torch.equal(mfbprop.gemm(first, second, signed), first.long() @ second.long()))
    return found


def _logarithms() -> torch.Tensor:
    return torch.tensor(get_format(mfbprop.LOGARITHMIC).levels())


def train_both(folder: Path, overrides: Sequence[str] = ()) -> dict:
    """Train the same run with LUQRUN_KERNELS=mfbprop and without it, in processes of their own, and compare the models
    of their last checkpoints bit for bit."""
    models, seconds, steps = [], [], 0
    for kernels in ("mfbprop", None):
        run = folder / (kernels or "default")
        environment = {key: value for key, value in os.environ.items() if key != "LUQRUN_KERNELS"}
        environment |= {"LUQRUN_KERNELS": kernels} if kernels else {}
        command = [sys.executable, "-m", "luqrun", *TRAINING, *overrides, f"hydra.run.dir={run}"]
        started = time.perf_counter()
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - started)
        content = torch.load(run / "checkpoints" / "last.pt", weights_only=True)
        models.append(content["model"])
        steps = content["progress"]["step"]
    first, second = models
    same = first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    numbers = sum(each.numel() for each in first.values())
    shown = " ".join(["luqrun", *TRAINING, *overrides])
    return {"command": shown, "identical": same, "numbers": numbers, "steps": steps, "seconds": seconds}


def show(folder: Path, recipes: Sequence[str]) -> dict:
    """All of it; trains in `folder`."""
    gemms = equal_gemms()
    return {
        "signed": products(True),
        "unsigned": products(False),
        "gemms": len(gemms),
        "gemms_equal": all(gemms),
        "trained": [train_both(folder / name, [f"quant={name}"]) for name in recipes],
    }
