"""The networks: torchvision's own, and small members of each family for images of 20 to 64 pixels.

Every model takes (N, channels, image_size, image_size) float images and returns (N, num_classes) float logits.
Weights are initialised as torchvision does; none are downloaded.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from functools import partial

import torchvision.models as tv
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from luqrun.config import ModelConfig
from luqrun.errors import UserError, check_at_least, check_choice

STEMS = ("auto", "small", "full")
SMALL_STEM_MAX_SIZE = 64

# A MobileNet-V2 stage is [expansion, channels, blocks, stride]. Usual adaptation to 32 pixels: the first convolution
# and the 24-channel stage lose their stride, so that the last feature map is 4 pixels wide instead of 1.
_MOBILENET_V2_SMALL = (
    [1, 16, 1, 1],
    [6, 24, 2, 1],
    [6, 32, 3, 2],
    [6, 64, 4, 2],
    [6, 96, 3, 1],
    [6, 160, 3, 2],
    [6, 320, 1, 1],
)
# Channels before the width multiplier of 0.5.
_MOBILENET_TINY = ([1, 16, 1, 1], [4, 24, 1, 2], [4, 40, 1, 2], [4, 64, 1, 1])


def _replace_first_conv(conv: nn.Conv2d, channels: int, kernel_size: int, stride: int) -> nn.Conv2d:
    """A convolution like `conv` for `channels` input channels, initialised as torchvision's convolutional nets are."""
    new = nn.Conv2d(channels, conv.out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False)
    nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
    return new


def _resnet(
    builder: Callable[..., tv.ResNet], *, num_classes: int, channels: int, image_size: int, stem: str
) -> nn.Module:
    """A torchvision ResNet; the small stem is a 3x3 convolution of stride 1 without max-pooling."""
    model = builder(weights=None, num_classes=num_classes)
    if stem == "small":
        model.conv1 = _replace_first_conv(model.conv1, channels, kernel_size=3, stride=1)
        model.maxpool = nn.Identity()
    elif channels != 3:
        model.conv1 = _replace_first_conv(model.conv1, channels, kernel_size=7, stride=2)
    return model


def _small_resnet(
    block: type[BasicBlock] | type[Bottleneck],
    planes: tuple[int, ...],
    groups: int = 1,
    width_per_group: int = 64,
    *,
    num_classes: int,
    channels: int,
    image_size: int,
    stem: str,
) -> nn.Module:
    """A residual network with one torchvision block a stage; every stage but the first halves the image.

    Modules are named as in torchvision's ResNet: conv1, bn1, layer1.0.conv1, layer2.0.downsample.0, fc.
    """
    width = planes[0] * block.expansion
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv1=nn.Conv2d(channels, width, 3, padding=1, bias=False),
        bn1=nn.BatchNorm2d(width),
        relu=nn.ReLU(inplace=True),
    )
    for i, num_planes in enumerate(planes):
        stride = 1 if i == 0 else 2
        out_width = num_planes * block.expansion
        downsample = None
        if stride != 1 or width != out_width:
            downsample = nn.Sequential(
                nn.Conv2d(width, out_width, 1, stride=stride, bias=False), nn.BatchNorm2d(out_width)
            )
        layers[f"layer{i + 1}"] = nn.Sequential(block(width, num_planes, stride, downsample, groups, width_per_group))
        width = out_width
    layers.update(avgpool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), fc=nn.Linear(width, num_classes))
    model = nn.Sequential(layers)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


def _mobilenet(
    small_setting: tuple[list[int], ...],
    width: float = 1.0,
    *,
    num_classes: int,
    channels: int,
    image_size: int,
    stem: str,
) -> nn.Module:
    """torchvision's MobileNet-V2; the small stem takes `small_setting` and a first convolution of stride 1."""
    small = stem == "small"
    setting = list(small_setting) if small else None
    model = tv.MobileNetV2(num_classes=num_classes, width_mult=width, inverted_residual_setting=setting)
    if small or channels != 3:
        first = model.features[0]
        first[0] = _replace_first_conv(first[0], channels, kernel_size=3, stride=1 if small else 2)
    return model


def _vit(
    builder: Callable[..., tv.VisionTransformer],
    name: str,
    patch_size: int,
    *,
    num_classes: int,
    channels: int,
    image_size: int,
    stem: str,
) -> nn.Module:
    """A torchvision vision transformer. It has patches instead of a stem."""
    if image_size % patch_size:
        raise UserError(
            f"dataset.image_size={image_size} is not a multiple of {patch_size}, the patch size of model.name={name}"
        )
    model = builder(image_size=image_size, num_classes=num_classes)
    if channels != 3:
        model.conv_proj = nn.Conv2d(channels, model.hidden_dim, patch_size, stride=patch_size)
        nn.init.trunc_normal_(model.conv_proj.weight, std=math.sqrt(1 / (channels * patch_size**2)))
        nn.init.zeros_(model.conv_proj.bias)
    return model


_vit_tiny = partial(tv.VisionTransformer, patch_size=4, num_layers=4, num_heads=4, hidden_dim=64, mlp_dim=256)

# name: the builder and the stems it can have
_BUILDERS: dict[str, tuple[Callable[..., nn.Module], tuple[str, ...]]] = {
    "resnet18": (partial(_resnet, tv.resnet18), ("small", "full")),
    "resnet50": (partial(_resnet, tv.resnet50), ("small", "full")),
    "resnext50_32x4d": (partial(_resnet, tv.resnext50_32x4d), ("small", "full")),
    "mobilenet_v2": (partial(_mobilenet, _MOBILENET_V2_SMALL), ("small", "full")),
    "vit_b_16": (partial(_vit, tv.vit_b_16, "vit_b_16", 16), ("full",)),
    "resnet8": (partial(_small_resnet, BasicBlock, (16, 32, 64)), ("small",)),
    "resnext8": (partial(_small_resnet, Bottleneck, (8, 16, 32), groups=4, width_per_group=64), ("small",)),
    "mobilenet_tiny": (partial(_mobilenet, _MOBILENET_TINY, 0.5), ("small",)),
    "vit_tiny": (partial(_vit, _vit_tiny, "vit_tiny", 4), ("full",)),
}
MODELS = tuple(_BUILDERS)


def build_model(config: ModelConfig, num_classes: int, channels: int, image_size: int) -> nn.Module:
    """The network `config.name` for (N, channels, image_size, image_size) images.

    `config.stem`: "small" keeps the resolution at the input, "full" is ImageNet's, "auto" is small for images of up
    to SMALL_STEM_MAX_SIZE pixels. Models that have one stem only take "auto" or that one. The weights come from
    torch's global generator. Raises UserError for unknown names, a stem or image size the model cannot have,
    fewer than two classes, or channels other than 1 and 3.
    """
    check_choice("model.name", config.name, MODELS)
    check_choice("model.stem", config.stem, STEMS)
    check_at_least("dataset.image_size", image_size, 1)
    if num_classes < 2:
        raise UserError(f"the data set of dataset.name has {num_classes} classes; a model needs at least 2")
    if channels not in (1, 3):
        raise UserError(f"the images of dataset.name have {channels} channels; allowed: 1, 3")
    builder, stems = _BUILDERS[config.name]
    stem = config.stem
    if stem == "auto":
        preferred = "small" if image_size <= SMALL_STEM_MAX_SIZE else "full"
        stem = preferred if preferred in stems else stems[0]
    elif stem not in stems:
        raise UserError(f"model.stem={stem} does not fit model.name={config.name}; allowed: auto, {stems[0]}")
    return builder(num_classes=num_classes, channels=channels, image_size=image_size, stem=stem)
