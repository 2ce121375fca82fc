"""Networks that the recipes train. Each factory is plain torch.nn; `convert` makes it maskable."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .vit import VisionTransformer

__all__ = [
    "build",
    "create",
    "import_object",
    "names",
    "resnet18",
    "resnet32",
    "resnet34",
    "resnet50",
    "resnet8",
    "vgg16",
    "vit_b16",
]


def _conv_norm(inputs: int, outputs: int, kernel: int, stride: int) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return [convolution, nn.BatchNorm2d(outputs)]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (1x1 convolution where the shape changes)."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv_norm(inputs, width, 3, stride)
        self.conv2, self.bn2 = _conv_norm(width, width, 3, 1)
        self.downsample = _shortcut(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + shortcut)


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride) and 1x1 convolution to four times the width, and a shortcut."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv_norm(inputs, width, 1, 1)
        self.conv2, self.bn2 = _conv_norm(width, width, 3, stride)
        self.conv3, self.bn3 = _conv_norm(width, width * self.expansion, 1, 1)
        self.downsample = _shortcut(inputs, width * self.expansion, stride)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        y = torch.relu(self.bn1(self.conv1(x)))
        y = torch.relu(self.bn2(self.conv2(y)))
        return torch.relu(self.bn3(self.conv3(y)) + shortcut)


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(*_conv_norm(inputs, outputs, 1, stride))


class ResNet(nn.Module):
    """A first convolution, stages of residual blocks of doubling width, pooling, one linear layer.

    Args:
        block: BasicBlock or Bottleneck.
        blocks: number of blocks per stage; every stage but the first halves the resolution.
        width: channels of the first stage.
        inputs: channels of the images.
        classes: outputs.
        large_images: start with a 7x7 convolution of stride 2 and max pooling (the ImageNet form)
            instead of a 3x3 convolution (the CIFAR form).
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        blocks: tuple[int, ...],
        width: int,
        inputs: int,
        classes: int,
        large_images: bool = False,
    ) -> None:
        super().__init__()
        kernel, stride = (7, 2) if large_images else (3, 1)
        self.conv1, self.bn1 = _conv_norm(inputs, width, kernel, stride)
        self.pool = nn.MaxPool2d(3, 2, 1) if large_images else nn.Identity()
        stages, channels = [], width
        for index, count in enumerate(blocks):
            for position in range(count):
                stride = 2 if index > 0 and position == 0 else 1
                stages.append(block(channels, width * 2**index, stride))
                channels = width * 2**index * block.expansion
        self.blocks = nn.Sequential(*stages)
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        y = self.pool(torch.relu(self.bn1(self.conv1(x))))
        return self.fc(self.blocks(y).mean((2, 3)))


def resnet8(width: int = 8, inputs: int = 1, classes: int = 10) -> ResNet:
    """Three residual blocks of `width`, 2 `width` and 4 `width` channels, for images of 8 to 32."""
    return ResNet(BasicBlock, (1, 1, 1), width, inputs, classes)


def resnet18(
    width: int = 64, inputs: int = 3, classes: int = 10, large_images: bool = False
) -> ResNet:
    """ResNet-18 (He et al., 2016) in the CIFAR form, or in the ImageNet form (`large_images`)."""
    return ResNet(BasicBlock, (2, 2, 2, 2), width, inputs, classes, large_images)


def resnet32(width: int = 16, inputs: int = 3, classes: int = 10) -> ResNet:
    """ResNet-32 for CIFAR (He et al., 2016, section 4.2); width 32 is the WRN-32 (x2) of AST."""
    return ResNet(BasicBlock, (5, 5, 5), width, inputs, classes)


def resnet34(
    width: int = 64, inputs: int = 3, classes: int = 10, large_images: bool = False
) -> ResNet:
    """ResNet-34 (He et al., 2016) in the CIFAR form, or in the ImageNet form (`large_images`)."""
    return ResNet(BasicBlock, (3, 4, 6, 3), width, inputs, classes, large_images)


def resnet50(
    width: int = 64, inputs: int = 3, classes: int = 1000, large_images: bool = True
) -> ResNet:
    """ResNet-50 in the ImageNet form, or the CIFAR form; stride in the 3x3 convolutions."""
    return ResNet(Bottleneck, (3, 4, 6, 3), width, inputs, classes, large_images)


class VGG(nn.Module):
    """3x3 convolutions with BatchNorm, max pooling between groups, one linear layer.

    Args:
        groups: channels of the convolutions, one tuple per resolution.
        inputs: channels of the images.
        classes: outputs.
    """

    def __init__(self, groups: tuple[tuple[int, ...], ...], inputs: int, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for group in groups:
            for outputs in group:
                layers += [*_conv_norm(inputs, outputs, 3, 1), nn.ReLU()]
                inputs = outputs
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).mean((2, 3)))


def vgg16(width: int = 64, inputs: int = 3, classes: int = 10) -> VGG:
    """VGG-16 with BatchNorm and a single linear layer (the CIFAR form), for images of 32x32."""
    w = width
    groups = ((w,) * 2, (2 * w,) * 2, (4 * w,) * 3, (8 * w,) * 3, (8 * w,) * 3)
    return VGG(groups, inputs, classes)


def vit_b16(**args: Any) -> VisionTransformer:
    """ViT-B/16 (Dosovitskiy et al., 2021) for images of 224x224 unless `args` change it."""
    return VisionTransformer(**args)


_KINDS = (resnet8, resnet18, resnet32, resnet34, resnet50, vgg16, vit_b16)
_FACTORIES: dict[str, Callable[..., nn.Module]] = {kind.__name__: kind for kind in _KINDS}


def names() -> list[str]:
    """Names that `build` knows."""
    return list(_FACTORIES)


def build(name: str, args: dict[str, Any] | None = None) -> nn.Module:
    """Build a model by name; it remembers name and arguments in `factory` for the files.

    Raises ValueError for an unknown name or arguments that the factory does not take.
    """
    if name not in _FACTORIES:
        raise ValueError(
            f"models: name={name!r} is unknown; use one of {', '.join(_FACTORIES)}, or "
            "package.module:function for your own"
        )
    args = dict(args or {})
    try:
        model = _FACTORIES[name](**args)
    except TypeError as error:
        raise ValueError(f"models: {name} does not take {args} ({error})") from error
    model.factory = {"name": name, "args": args}
    return model


def create(name: str, args: dict[str, Any] | None = None) -> nn.Module:
    """`build`, or the user's own factory when the name is `package.module:function`."""
    if ":" not in name:
        return build(name, args)
    model = import_object(name)(**(args or {}))
    if not isinstance(model, nn.Module):
        raise TypeError(f"models: {name} returned a {type(model).__name__}, not a torch.nn.Module")
    return model


def import_object(spec: str) -> Any:
    """The object that `package.module:name` names; the present folder is searched too.

    Raises ValueError when it cannot be imported. Only for names that the user typed.
    """
    module, _, name = spec.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{spec!r} cannot be imported ({error}); give package.module:function, findable from "
            "the present folder or installed"
        ) from error
    finally:
        sys.path.pop(0)
