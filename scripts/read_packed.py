"""Reads what luqrun-export writes, without luqrun: python scripts/read_packed.py FILE   lists its tensors."""

import json
import sys

import torch
from safetensors import safe_open


class NotPacked(ValueError):
    """A file of safetensors that is no packed export."""


def read(path: str) -> dict[str, torch.Tensor]:
    """A state_dict in which each weight that was packed has its quantized values, float32. Raises NotPacked for a file
    without packed codes."""
    with safe_open(path, framework="pt") as file:
        stored, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    if "weights" not in metadata:
        raise NotPacked("not a file of packed codes, as luqrun-export RUN writes without --full")
    for name, how in json.loads(metadata["weights"]).items():
        codes, scale, whole = (stored.pop(f"{name}.{part}") for part in ("codes", "scale", "tensor_scale"))
        bits = (codes[:, None] >> torch.arange(8)).flatten() & 1
        count = torch.Size(how["shape"]).numel() * how["bits"]
        places = (bits[:count].view(-1, how["bits"]) << torch.arange(how["bits"])).sum(1)
        values, scale = torch.tensor(how["table"])[places].view(how["shape"]), scale.float()
        if how["block"]:
            rows = how["shape"][0] // how["groups"]
            parts = scale.view(how["groups"], -1, *scale.shape[1:]).repeat_interleave(how["block"][0], 1)
            scale = parts[:, :rows].flatten(0, 1).repeat_interleave(how["block"][1], 1)[:, : how["shape"][1]]
        stored[name] = values * scale * whole
    return stored | {alias: stored[name] for alias, name in json.loads(metadata["tied"]).items()}


def main(arguments: list[str]) -> None:
    """List the tensors of a file, or leave with one line."""
    if len(arguments) != 1:
        sys.exit("usage: python scripts/read_packed.py FILE")
    try:
        tensors = read(arguments[0])
    except Exception as error:  # of safetensors, or whatever a damaged description leads to
        why = str(error) if isinstance(error, NotPacked | OSError) else f"damaged ({type(error).__name__}: {error})"
        sys.exit(" ".join(f"read_packed.py: {arguments[0]}: {why}".split())[:300])
    for name, tensor in tensors.items():
        print(name, tuple(tensor.shape), f"{tensor.unique().numel()} values")


if __name__ == "__main__":
    main(sys.argv[1:])
