"""Networks: shapes, stems, channels, names of shortcuts, refused combinations."""

import pytest
import torch
import torch.nn.functional as F
import torchvision.models as tv
from torch import nn

from luqrun.config import ModelConfig
from luqrun.errors import UserError
from luqrun.tasks.classification.networks import MODELS, build_model

SMALL = ("resnet8", "resnext8", "mobilenet_tiny", "vit_tiny")


@pytest.fixture(autouse=True)
def _one_thread():
    """Layers this small spend their time in the thread pool's barriers when the machine is busy."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def build(name, num_classes=10, channels=3, image_size=32, stem="auto"):
    torch.manual_seed(0)
    return build_model(ModelConfig(name=name, stem=stem), num_classes, channels, image_size)


@pytest.mark.parametrize(
    ("name", "channels", "image_size"),
    [(name, 3, size) for name in MODELS for size in (32, 224)]
    + [(name, 1, 20) for name in MODELS if name != "vit_b_16"]
    + [("vit_b_16", 1, 48)],
)
def test_logits_have_a_column_a_class(name, channels, image_size):
    with torch.device("meta"):  # shapes alone: the large networks would take seconds
        model = build(name, 47, channels, image_size)
        assert model(torch.empty(2, channels, image_size, image_size)).shape == (2, 47)


@pytest.mark.parametrize("name", SMALL)
def test_small_models_learn_four_grey_images_by_heart(name):
    model = build(name, num_classes=4, channels=1, image_size=20)
    torch.manual_seed(1)
    images, labels = torch.randn(4, 1, 20, 20), torch.arange(4)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(30):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())
    assert torch.equal(model(images).argmax(1), labels)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d", "mobilenet_v2", "vit_b_16"])
def test_full_size_models_have_torchvisions_parameters(name):
    with torch.device("meta"):
        ours = build(name, num_classes=1000, image_size=224)
        theirs = tv.get_model(name, weights=None)
    shapes = [{name: p.shape for name, p in model.named_parameters()} for model in (ours, theirs)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_full_stem_is_torchvisions_network(name):
    ours = build(name, num_classes=1000, image_size=224).eval()
    torch.manual_seed(0)
    theirs = tv.get_model(name, weights=None).eval()
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(ours(images), theirs(images))


@pytest.mark.parametrize(
    ("name", "image_size", "stem", "first", "last"),
    [
        ("resnet18", 32, "auto", 32, 4),
        ("resnet18", 64, "auto", 64, 8),
        ("resnet18", 65, "auto", 33, 3),
        ("resnet18", 32, "full", 16, 1),
        ("resnet18", 96, "small", 96, 12),
        ("mobilenet_v2", 32, "auto", 32, 4),
        ("mobilenet_v2", 64, "auto", 64, 8),
        ("mobilenet_v2", 65, "auto", 33, 3),
        ("mobilenet_v2", 32, "full", 16, 1),
        ("resnet8", 20, "auto", 20, 5),
        ("resnet8", 96, "auto", 96, 24),
        ("resnext8", 20, "auto", 20, 5),
        ("mobilenet_tiny", 20, "auto", 20, 5),
        ("vit_tiny", 20, "auto", 5, 5),
    ],
)
def test_stem_sets_the_resolution(name, image_size, stem, first, last):
    with torch.device("meta"):
        model = build(name, image_size=image_size, stem=stem)
    sizes = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda _module, _inputs, output: sizes.append(output.shape[-1]))
    model(torch.empty(2, 3, image_size, image_size, device="meta"))
    assert (sizes[0], sizes[-1]) == (first, last)


@pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d"])
def test_small_stem_of_a_resnet(name):
    with torch.device("meta"):
        model = build(name, channels=1)
    assert model.conv1.weight.shape == (64, 1, 3, 3)
    assert isinstance(model.maxpool, nn.Identity)


@pytest.mark.parametrize(
    ("name", "stem", "kernel"), [("resnet18", "full", 7), ("mobilenet_v2", "full", 3), ("mobilenet_v2", "small", 3)]
)
def test_grey_images_change_the_first_convolution_only(name, stem, kernel):
    with torch.device("meta"):
        grey = dict(build(name, channels=1, stem=stem).named_parameters())
        colour = dict(build(name, channels=3, stem=stem).named_parameters())
    changed = [key for key in colour if grey[key].shape != colour[key].shape]
    assert grey.keys() == colour.keys()
    assert [tuple(grey[key].shape[1:]) for key in changed] == [(1, kernel, kernel)]


@pytest.mark.parametrize("name", ["resnet18", "resnet8", "resnext8", "mobilenet_v2", "mobilenet_tiny"])
def test_convolutions_are_initialised_with_fan_out(name):
    """Standard deviation sqrt(2 / fan_out), within 4 standard errors (1 / sqrt(2 n)) for all convolutions at once."""
    model = build(name, channels=1)
    scaled = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * module.kernel_size[0] ** 2  # as torch counts it, groups or not
            scaled.append(module.weight.detach().flatten() / (2 / fan_out) ** 0.5)
    scaled = torch.cat(scaled)
    assert abs(scaled.std().item() - 1) < 4 / (2 * scaled.numel()) ** 0.5


def test_shortcuts_are_named_as_in_torchvision():
    def shortcuts(name):
        with torch.device("meta"):
            return [key for key, _ in build(name).named_modules() if ".downsample.0" in key]

    assert shortcuts("resnet8") == ["layer2.0.downsample.0", "layer3.0.downsample.0"]
    assert shortcuts("resnext8") == ["layer2.0.downsample.0", "layer3.0.downsample.0"]
    assert shortcuts("resnet18") == ["layer2.0.downsample.0", "layer3.0.downsample.0", "layer4.0.downsample.0"]


def test_resnext8_is_grouped():
    assert {build("resnext8").get_submodule(f"layer{i}.0.conv2").groups for i in (1, 2, 3)} == {4}


@pytest.mark.parametrize(
    ("name", "stem", "num_classes", "channels", "image_size", "words"),
    [
        ("resnet9", "auto", 10, 3, 32, ["model.name=resnet9", "resnet8"]),
        ("resnet8", "tiny", 10, 3, 32, ["model.stem=tiny", "auto, small, full"]),
        ("resnet8", "full", 10, 3, 32, ["model.stem=full", "model.name=resnet8", "small"]),
        ("vit_tiny", "small", 10, 3, 32, ["model.stem=small", "model.name=vit_tiny", "full"]),
        ("vit_b_16", "auto", 10, 3, 20, ["dataset.image_size=20", "16", "model.name=vit_b_16"]),
        ("vit_tiny", "auto", 10, 3, 30, ["dataset.image_size=30", "4", "model.name=vit_tiny"]),
        ("resnet8", "auto", 1, 3, 32, ["dataset.name", "1 class"]),
        ("resnet8", "auto", 10, 2, 32, ["dataset.name", "2 channels", "1, 3"]),
        ("resnet8", "auto", 10, 3, 0, ["dataset.image_size=0"]),
    ],
)
def test_refused(name, stem, num_classes, channels, image_size, words):
    with pytest.raises(UserError) as error:
        build(name, num_classes, channels, image_size, stem)
    assert all(word in str(error.value) for word in words)
