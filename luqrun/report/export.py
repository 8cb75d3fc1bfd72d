"""luqrun-export: the weights of a finished run as one file of safetensors, packed in 4 bits or in full precision.

What the packed file holds is said in its own metadata; scripts/read_packed.py reads it without luqrun.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Container, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from torch import Tensor, nn

from luqrun import __version__
from luqrun.config import Config
from luqrun.errors import UserError
from luqrun.quant.convert import quantize_model
from luqrun.quant.packed import packed_weights
from luqrun.quant.recipe import Recipe
from luqrun.report.records import printable
from luqrun.report.stored_config import stored_config, with_own_weights
from luqrun.runs import checkpoint
from luqrun.runs.folder import RunFolder, write_atomically
from luqrun.runs.weights import PACKED, SETTINGS_OF_RUN, read_weights
from luqrun.tasks import bare_network
from luqrun.train.starting_weights import OPTIONAL, load_weights

HOW = (
    "NAME.codes holds prod(shape) codes of `bits` bits, row-major: code i is in the bits from i * bits on of a "
    "little-endian bit string. value = table[code] * scale * tensor_scale, in float32 and in this order. scale is one "
    "number, or with `block` [a, b] one for each a x b elements of axes 0 and 1: shape[0] is divided into `groups` "
    "equal parts, each of these into blocks of a, shape[1] into blocks of b, and the last block of an axis may be "
    "short. With `hadamard` n the weight was multiplied by NAME.signs (if there) and rotated in groups of n along axis "
    "1 before: multiply with activations that are rotated alike. `tied`: other names of the same tensor. Tensors "
    "without .codes are as they were trained."
)
MIB = 2**20


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and export; the exit code."""
    parser = argparse.ArgumentParser(prog="luqrun-export", description="The weights of a finished run as safetensors.")
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--full", action="store_true", help="in full precision, under torchvision's names")
    parser.add_argument("--best", action="store_true", help="of the best epoch instead of the last one")
    parser.add_argument("--out", type=Path, help="the file; default: RUN/packed.safetensors, or RUN/full.safetensors")
    chosen = parser.parse_args(arguments)
    out = chosen.out or chosen.run / ("full.safetensors" if chosen.full else "packed.safetensors")
    try:
        print(export(chosen.run, out, chosen.full, chosen.best))
    except (UserError, OSError) as error:
        parser.exit(1, f"luqrun-export: {printable(str(error))}\n")
    return 0


def export(run: Path, out: Path, full: bool = False, best: bool = False) -> str:
    """Write the file; what it takes, in words. Raises UserError for a run that has not finished, or has no such
    weights."""
    config = stored_config(run)
    record = RunFolder(run).run()
    path = _checkpoint(run, record, config, best)
    weights = read_weights(str(path))
    whole = {name: tensor for name, tensor in weights.tensors.items() if not name.endswith(OPTIONAL[0])}
    size = sum(tensor.nbytes for tensor in _without_ties(whole)[0].values())
    metadata = {"format": "pt", "run": run.resolve().name, "recipe": json.dumps(asdict(config.quant))}
    metadata |= {"luqrun": __version__, "RESULTS": str(record.get("results", 1))}
    metadata[SETTINGS_OF_RUN] = json.dumps(weights.settings)
    if full:
        stored, _ = _without_ties(whole)
        return f"{_write(out, stored, metadata)}, in full precision, {len(stored)} tensors"
    if Recipe.from_config(config.quant).fprop.weight is None:
        raise UserError(f"{run}: quant={config.quant.name} quantizes no weight in fprop; --full exports the others")
    model = _network(run, config, path)
    packed = dict(packed_weights(model))
    if not packed:
        raise UserError(f"{run}: quant.skip leaves no layer that is quantized; --full exports the weights")
    stored, tied = _without_ties(model.state_dict(), packed)
    parts = {f"{name}.{part}": tensor for name, each in packed.items() for part, tensor in each.tensors().items()}
    metadata |= {PACKED: HOW, "tied": json.dumps(tied)}
    metadata["weights"] = json.dumps({name: each.description() for name, each in packed.items()})
    text = _write(out, {**stored, **parts}, metadata)
    count = sum(model.get_parameter(name).numel() for name in packed)
    kept = sum(tensor.nbytes for tensor in parts.values())
    shown = f"{count:,} weights of {len(packed)} layers in {kept / MIB:.2f} MiB ({8 * kept / count:.2f} bits each)"
    return f"{text}: {shown}, {len(stored)} other tensors as they are; all in full precision is {size / MIB:.2f} MiB"


def _checkpoint(run: Path, record: dict, config: Config, best: bool) -> Path:
    status = record.get("status", "not begun")
    if config.job != "train":
        raise UserError(f"{run} is of job={config.job}, which trains no weights; export the run that trained them")
    if status == "diverged":
        raise UserError(f"{run} diverged at step {record.get('diverged_at_step')}: it has no weights to export")
    if status != "finished":
        raise UserError(f"{run} has not finished (its status: {status}); the same command goes on with it")
    if record.get("reused"):
        raise UserError(f"{run} was taken over, and has no checkpoint: export {run / record['reused']}")
    path = run / "checkpoints" / (checkpoint.BEST if best else checkpoint.LAST)
    if not path.is_file():
        raise UserError(f"{run} has no {path.relative_to(run)}, which holds the weights")
    return path


def _network(run: Path, config: Config, path: Path) -> nn.Module:
    """The run's network, quantized, with the weights of a checkpoint."""
    config = with_own_weights(config, run, path)
    try:
        network, example = bare_network(config, checkpoint.read(path))
    except KeyError as size:
        raise UserError(f"{path} has no {size}, the size of its network, as those of an earlier luqrun") from None
    model = quantize_model(network, Recipe.from_config(config.quant), seed=config.seed, example=example)
    load_weights(model, read_weights(str(path)), head="", new_head=False)
    return model


def _without_ties(
    tensors: Mapping[str, Tensor], packed: Container[str] = ()
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors that are not packed, each memory once and dense; and the other names of the same memory."""
    first: dict[tuple, str] = {}
    tied = {}
    for name, tensor in tensors.items():
        if name not in packed:
            key = (tensor.data_ptr(), tensor.shape) if tensor.numel() else (name,)
            if first.setdefault(key, name) != name:
                tied[name] = first[key]
    return {name: tensors[name].detach().contiguous().clone() for name in first.values()}, tied


def _write(out: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    from safetensors.torch import save

    out.parent.mkdir(parents=True, exist_ok=True)
    stored = save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata)
    write_atomically(out, stored)
    return f"{out}: {len(stored) / MIB:.2f} MiB"
