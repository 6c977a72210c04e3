"""The network against the table in the paper's appendix."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from batchnorm import BatchNorm2d
from batchnorm.experiments.inception.network import EPS, Inception, parameter_count

# The paper's table: output size and channels of each module at 224×224 pixels.
TABLE = {
    "3a": (28, 256), "3b": (28, 320), "3c": (14, 576), "4a": (14, 576), "4b": (14, 576), "4c": (14, 576),
    "4d": (14, 576), "4e": (7, 1024), "5a": (7, 1024), "5b": (7, 1024),
}  # fmt: skip
# The table's columns 1×1, 3×3 reduce, 3×3, double 3×3 reduce, double 3×3 (twice), pool projection.
CONVOLUTIONS = {
    "3a": (64, 64, 64, 64, 96, 96, 32),
    "3b": (64, 64, 96, 64, 96, 96, 64),
    "3c": (128, 160, 64, 96, 96),
    "4a": (224, 64, 96, 96, 128, 128, 128),
    "4b": (192, 96, 128, 96, 128, 128, 128),
    "4c": (160, 128, 160, 128, 160, 160, 96),
    "4d": (96, 128, 192, 160, 192, 192, 96),
    "4e": (128, 192, 192, 256, 256),
    "5a": (352, 192, 320, 160, 224, 224, 128),
    "5b": (352, 192, 320, 192, 224, 224, 128),
}


def built(**options: object) -> Inception:
    settings: dict[str, object] = {"classes": 10, "channels": 1, "size": 28, "width": 1 / 8} | options
    return Inception(**settings, generator=torch.Generator().manual_seed(0))  # type: ignore[arg-type]


def shapes_of_layers(network: Inception, images: Tensor) -> dict[str, torch.Size]:
    found: dict[str, torch.Size] = {}
    x = images
    for name, layer in network.features.named_children():
        x = layer(x)
        found[name] = x.shape
    return found


def test_every_layer_of_the_papers_network_has_the_tables_shape() -> None:
    with torch.device("meta"):
        network = Inception(classes=1000, channels=3, size=224, generator=torch.Generator())
        shapes = shapes_of_layers(network, torch.empty(1, 3, 224, 224))
        assert network(torch.empty(2, 3, 224, 224)).shape == (2, 1000)
    assert shapes["conv1"] == (1, 64, 112, 112)
    assert shapes["pool1"] == (1, 64, 56, 56)
    assert shapes["conv2"] == (1, 192, 56, 56)
    assert shapes["pool2"] == (1, 192, 28, 28)
    assert {name.removeprefix("module_"): (s[2], s[1]) for name, s in shapes.items() if "module" in name} == TABLE


def test_every_convolution_of_the_papers_network_has_the_tables_channels() -> None:
    with torch.device("meta"):
        network = Inception(classes=1000, channels=3, size=224, generator=torch.Generator())
    for name, channels in CONVOLUTIONS.items():
        block = network.features.get_submodule(f"module_{name}")
        convolutions = [layer for layer in block.modules() if isinstance(layer, nn.Conv2d)]
        assert tuple(layer.out_channels for layer in convolutions) == channels
        strides = [layer.stride for layer in convolutions if layer.stride != (1, 1)]
        assert strides == ([(2, 2), (2, 2)] if name in ("3c", "4e") else [])
        kinds = [type(layer) for layer in block.modules() if isinstance(layer, (nn.MaxPool2d, nn.AvgPool2d))]
        assert kinds == [nn.MaxPool2d if name in ("3c", "4e", "5b") else nn.AvgPool2d]


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({"classes": 1000, "channels": 3, "size": 224, "width": 1.0}, 11_194_984),
        ({"classes": 1000, "channels": 3, "size": 224, "width": 1.0, "normalize": False}, 11_185_032),
        ({"normalize": False}, 161_054),
    ],
)
def test_the_number_of_parameters_that_the_documentation_gives(options: dict[str, object], count: int) -> None:
    with torch.device("meta"):
        settings: dict[str, object] = {"classes": 10, "channels": 1, "size": 28, "width": 1 / 8} | options
        network = Inception(**settings, generator=torch.Generator())  # type: ignore[arg-type]
    assert parameter_count(network) == count


def test_batch_normalization_stands_between_convolution_and_nonlinearity_and_takes_the_biases_place() -> None:
    for nonlinearity in ("relu", "sigmoid"):
        network = built(nonlinearity=nonlinearity)
        layers = list(network.features.modules())
        convolutions = [k for k, layer in enumerate(layers) if isinstance(layer, nn.Conv2d)]
        assert len(convolutions) == 69
        for k in convolutions:
            normalization = layers[k + 1]
            assert isinstance(normalization, BatchNorm2d) and normalization.eps == EPS
            assert layers[k].bias is None
            fused = normalization.activation == "relu"
            assert fused if nonlinearity == "relu" else isinstance(layers[k + 2], nn.Sigmoid)


def test_plain_and_normalized_networks_start_from_the_same_weights() -> None:
    plain, normalized = built(normalize=False), built()
    pairs = zip(
        (layer for layer in plain.modules() if isinstance(layer, nn.Conv2d)),
        (layer for layer in normalized.modules() if isinstance(layer, nn.Conv2d)),
        strict=True,
    )
    for one, other in pairs:
        assert torch.equal(one.weight, other.weight)
        assert one.bias is not None and not one.bias.any()
        expected = math.sqrt(2 / one.weight[0].numel())
        assert abs(one.weight.std() - expected) < 5 * expected / math.sqrt(2 * one.weight.numel())
    assert torch.equal(plain.linear.weight, normalized.linear.weight)


@pytest.mark.parametrize(("size", "first", "last"), [(224, 28, 7), (28, 7, 2), (16, 8, 2), (8, 8, 2), (1, 1, 1)])
def test_smaller_images_keep_seven_pixels_for_the_first_module(size: int, first: int, last: int) -> None:
    shapes = shapes_of_layers(built(size=size, width=1 / 64).eval(), torch.zeros(1, 1, size, size))
    assert shapes["module_3a"][2] == first
    assert shapes["module_5b"][2] == last


def test_dropout_draws_from_its_own_generator_and_in_training_alone() -> None:
    network = built(dropout=0.5, width=1 / 32)
    x = torch.randn(4, 1, 28, 28)
    before = torch.get_rng_state()
    network.dropout.generator = torch.Generator().manual_seed(1)
    one = network(x)
    network.dropout.generator = torch.Generator().manual_seed(1)
    assert torch.equal(one, network(x))
    assert not torch.equal(one, network(x))
    assert torch.equal(torch.get_rng_state(), before)
    network.eval()
    assert torch.equal(network(x), network(x))


def test_local_response_normalization_stands_where_googlenet_has_it() -> None:
    names = [name for name, _ in built(local_response=True).features.named_children()]
    assert names[:7] == ["conv1", "pool1", "norm1", "conv2_reduce", "conv2", "norm2", "pool2"]
    assert "norm1" not in dict(built().features.named_children())
