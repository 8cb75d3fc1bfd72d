"""Reads what luqrun-export writes, without luqrun: python scripts/read_packed.py FILE   lists its tensors."""

import json
import sys

import torch
from safetensors import safe_open


def read(path: str) -> dict[str, torch.Tensor]:
    """A state_dict in which each weight that was packed has its quantized values, float32."""
    with safe_open(path, framework="pt") as file:
        stored, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
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


if __name__ == "__main__":
    for name, tensor in read(sys.argv[1]).items():
        print(name, tuple(tensor.shape), f"{tensor.unique().numel()} values")
