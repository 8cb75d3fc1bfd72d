"""Names of parameters: those that timm, and earlier torchvision, give a network that torchvision names otherwise.

timm's ResNets and ResNeXts have torchvision's names. Its MobileNet-V2 and its vision transformer compute the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

T = TypeVar("T")

# Of a block of timm's vision transformer.
_OF_VIT_BLOCKS = {
    "norm1": "ln_1",
    "attn.qkv": "self_attention.in_proj",
    "attn.proj": "self_attention.out_proj",
    "norm2": "ln_2",
    "mlp.fc1": "mlp.0",
    "mlp.fc2": "mlp.3",
    "mlp.linear_1": "mlp.0",  # torchvision's, earlier
    "mlp.linear_2": "mlp.3",
}
_OF_VIT = {
    "cls_token": "class_token",
    "pos_embed": "encoder.pos_embedding",
    "patch_embed.proj": "conv_proj",
    "norm": "encoder.ln",
    "head": "heads.head",
}
_OF_MOBILENET = {"conv_stem": "features.0.0", "bn1": "features.0.1", "classifier": "classifier.1"}
_OF_MOBILENET_BLOCKS = {
    "conv_pw": "conv.0.0", "bn1": "conv.0.1", "conv_dw": "conv.1.0", "bn2": "conv.1.1", "conv_pwl": "conv.2",
    "bn3": "conv.3",
}  # fmt: skip
_OF_FIRST_MOBILENET_BLOCK = {"conv_dw": "conv.0.0", "bn1": "conv.0.1", "conv_pw": "conv.1", "bn2": "conv.2"}


def torchvision_names(tensors: Mapping[str, T]) -> dict[str, T]:
    """The same under the names that torchvision gives them; names that are not known here stay."""
    if "conv_stem.weight" in tensors:
        blocks = _blocks(tensors)
        return {_of_mobilenet(name, blocks): tensor for name, tensor in tensors.items()}
    if any("encoder_layer_0." in name or name == "cls_token" for name in tensors):
        return {_of_vit(name): tensor for name, tensor in tensors.items()}
    return dict(tensors)


def _of_vit(name: str) -> str:
    found = re.fullmatch(r"(?:blocks\.|encoder\.layers\.encoder_layer_)(\d+)\.(.+?)([._](?:weight|bias))", name)
    if found:
        number, part, kind = found.groups()
        joint = "_" + kind[1:] if part == "attn.qkv" else kind  # one projection, whose weight is no layer's
        return f"encoder.layers.encoder_layer_{number}.{_OF_VIT_BLOCKS.get(part, part)}{joint}"
    return _replaced(name, _OF_VIT)


def _blocks(names: Iterable[str]) -> list[tuple[str, str]]:
    """(stage, place) of timm's blocks, in the order of torchvision's features from 1 on."""
    found = {(each[1], each[2]) for name in names if (each := re.match(r"blocks\.(\d+)\.(\d+)\.", name))}
    return sorted(found, key=lambda block: tuple(map(int, block)))


def _of_mobilenet(name: str, blocks: list[tuple[str, str]]) -> str:
    if found := re.fullmatch(r"blocks\.(\d+)\.(\d+)\.(.+)", name):
        number = blocks.index((found[1], found[2])) + 1
        table = _OF_FIRST_MOBILENET_BLOCK if number == 1 else _OF_MOBILENET_BLOCKS
        return f"features.{number}.{_replaced(found[3], table)}"
    last = len(blocks) + 1
    return _replaced(name, {**_OF_MOBILENET, "conv_head": f"features.{last}.0", "bn2": f"features.{last}.1"})


def _replaced(name: str, table: Mapping[str, str]) -> str:
    """The name with another beginning: `table` has the beginnings, whole parts between dots."""
    for old, new in table.items():
        if name == old or name.startswith(f"{old}."):
            return new + name.removeprefix(old)
    return name
