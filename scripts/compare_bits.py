"""Whether this checkout trains to the same bits as another commit: the same commands, run in both.

    python scripts/compare_bits.py COMMIT --out DIR [CASE ...]

A worktree of COMMIT is made under DIR, and so are both sides' run folders: a second start goes on with what is
missing. Exit code 1 where weights or validation metrics differ. All cases take half an hour on two CPU cores.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
SHORT = ["dataset.glyphs.train_images=2000", "dataset.glyphs.val_images=500", "schedule.epochs=1", "finetune=none"]
RECIPES = ("luq", "luq_smp2", "fp2_both4", "radix4_tpr", "luq_hindsight", "forward_sr")
MODELS = ("resnet8", "mobilenet_tiny", "vit_tiny")
METRICS = ("val/top1", "val/loss")


def cases() -> dict[str, list[str]]:
    """Overrides by name: recipes x models x precisions, and of LUQ each model's fine-tune and accumulation."""
    found = {}
    for recipe, model, precision in itertools.product(RECIPES, MODELS, ("fp32", "bf16")):
        found[f"{recipe}-{model}-{precision}"] = [f"quant={recipe}", f"model={model}", f"precision={precision}"]
    for model in MODELS:
        found[f"fnt-{model}"] = [f"model={model}", "finetune=fnt1"]
        found[f"accumulate-{model}"] = [f"model={model}", "schedule.accumulate=2"]
    return found


def train(checkout: Path, out: Path, name: str, overrides: list[str]) -> Path:
    """Run one case with the code of `checkout`; returns its run folder."""
    out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "luqrun", f"study={name}", *SHORT, *overrides]
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    said = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run(command, cwd=out, env=environment, **said)
    if done.returncode:
        sys.exit(f"{name} failed in {checkout}:\n{done.stdout[-2000:]}")
    (folder,) = (path.parent for path in (out / "outputs" / name).glob("*/summary.json"))
    return folder


def differences(left: Path, right: Path) -> list[str]:
    """What differs between two run folders: tensors by name, and metrics."""
    ours, theirs = (torch.load(each / "checkpoints" / "last.pt", weights_only=True)["model"] for each in (left, right))
    found = sorted(ours.keys() ^ theirs.keys())
    found += [key for key in ours.keys() & theirs.keys() if not _same(ours[key], theirs[key])]
    ours, theirs = (json.loads((each / "summary.json").read_text()) for each in (left, right))
    return found + [f"{key} ({theirs[key]} before, {ours[key]} now)" for key in METRICS if ours[key] != theirs[key]]


def _same(x: torch.Tensor, y: torch.Tensor) -> bool:
    return x.dtype == y.dtype and x.shape == y.shape and x.numpy().tobytes() == y.numpy().tobytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("commit", help="the one to compare with")
    parser.add_argument("cases", nargs="*", metavar="CASE", help="such as luq-resnet8-fp32 (all)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="for the worktree and the run folders")
    parser.add_argument("--only", choices=("before", "now"), help="train one side, without comparing")
    arguments = parser.parse_intermixed_args()
    known = cases()
    if unknown := set(arguments.cases) - known.keys():
        parser.error(f"{', '.join(sorted(unknown))} is no case; allowed: {', '.join(known)}")
    out = arguments.out.resolve()
    before = out / "worktree"
    if not before.exists():
        subprocess.run(["git", "worktree", "add", "--detach", before, arguments.commit], cwd=ROOT, check=True)
    differ = 0
    for name in arguments.cases or known:
        sides = {"before": before, "now": ROOT}
        folders = {
            side: train(checkout, out / side, name, known[name])
            for side, checkout in sides.items()
            if arguments.only in (None, side)
        }
        found = differences(folders["now"], folders["before"]) if len(folders) == 2 else []
        differ += bool(found)
        print(f"{name}: {'; '.join(found) if found else 'the same bits' if len(folders) == 2 else 'done'}", flush=True)
    sys.exit(bool(differ))


if __name__ == "__main__":
    main()
