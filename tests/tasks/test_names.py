"""Names of parameters: what timm, and earlier torchvision, call them becomes torchvision's name."""

import pytest
import torchvision.models as tv
from torch import nn

from luqrun.tasks.classification.names import torchvision_names

NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
LAYER = ("weight", "bias")


def keys(model: nn.Module) -> set[str]:
    return set(model.state_dict())


def timm_mobilenet() -> list[str]:
    """As timm 1.0 names mobilenetv2_100, in its order: stages of 1, 2, 3, 4, 3, 3 and 1 blocks."""
    found = ["conv_stem.weight", *(f"bn1.{name}" for name in NORM)]
    for stage, count in enumerate((1, 2, 3, 4, 3, 3, 1)):
        for place in range(count):
            parts = ("conv_dw", "conv_pw") if stage == 0 else ("conv_pw", "conv_dw", "conv_pwl")
            for number, part in enumerate(parts, 1):
                block = f"blocks.{stage}.{place}"
                found += [f"{block}.{part}.weight", *(f"{block}.bn{number}.{name}" for name in NORM)]
    found += ["conv_head.weight", *(f"bn2.{name}" for name in NORM)]
    return [*found, "classifier.weight", "classifier.bias"]


def timm_vit(blocks: int) -> list[str]:
    """As timm 1.0 names vit_base_patch16_224."""
    found = ["cls_token", "pos_embed", *(f"patch_embed.proj.{name}" for name in LAYER)]
    for number in range(blocks):
        for part in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"):
            found += [f"blocks.{number}.{part}.{name}" for name in LAYER]
    return [*found, *(f"{part}.{name}" for part in ("norm", "head") for name in LAYER)]


def test_timm_s_mobilenet_has_the_same_layers_in_the_same_order():
    names = timm_mobilenet()
    found = torchvision_names(dict.fromkeys(names))
    assert list(found) == list(tv.mobilenet_v2().state_dict())


def vit(blocks: int) -> nn.Module:
    return tv.VisionTransformer(image_size=8, patch_size=4, num_layers=blocks, num_heads=2, hidden_dim=8, mlp_dim=12)


def test_timm_s_vision_transformer_has_the_same_parts():
    names = timm_vit(12)
    found = torchvision_names({name: name for name in names})
    assert found.keys() == keys(vit(12))
    prefix = "encoder.layers.encoder_layer_11"
    for new, old in {
        "class_token": "cls_token",
        "encoder.pos_embedding": "pos_embed",
        "conv_proj.weight": "patch_embed.proj.weight",
        f"{prefix}.ln_1.weight": "blocks.11.norm1.weight",
        f"{prefix}.self_attention.in_proj_weight": "blocks.11.attn.qkv.weight",
        f"{prefix}.self_attention.in_proj_bias": "blocks.11.attn.qkv.bias",
        f"{prefix}.self_attention.out_proj.weight": "blocks.11.attn.proj.weight",
        f"{prefix}.ln_2.bias": "blocks.11.norm2.bias",
        f"{prefix}.mlp.0.weight": "blocks.11.mlp.fc1.weight",
        f"{prefix}.mlp.3.bias": "blocks.11.mlp.fc2.bias",
        "encoder.ln.weight": "norm.weight",
        "heads.head.bias": "head.bias",
    }.items():
        assert found[new] == old


def test_earlier_names_of_torchvision_s_vision_transformer():
    names = keys(vit(2))
    earlier = {name.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): name for name in names}
    assert earlier.keys() != names
    assert torchvision_names(earlier) == {name: name for name in names}


@pytest.mark.parametrize("model", [tv.resnet18, tv.mobilenet_v2, lambda: vit(2)])
def test_torchvision_s_own_names_stay(model):
    names = list(model().state_dict())
    assert torchvision_names({name: name for name in names}) == {name: name for name in names}
