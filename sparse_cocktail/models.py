"""Networks that the recipes train. Each factory is plain torch.nn; `convert` makes it maskable."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["build", "names", "resnet8"]


def _conv_norm(inputs: int, outputs: int, kernel: int, stride: int) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return [convolution, nn.BatchNorm2d(outputs)]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (1x1 convolution where the shape changes)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv_norm(inputs, outputs, 3, stride)
        self.conv2, self.bn2 = _conv_norm(outputs, outputs, 3, 1)
        changes = stride != 1 or inputs != outputs
        self.downsample = (
            nn.Sequential(*_conv_norm(inputs, outputs, 1, stride)) if changes else None
        )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + shortcut)


class ResNet(nn.Module):
    """A first 3x3 convolution, stages of basic blocks of doubling width, pooling, one linear layer.

    Args:
        blocks: number of blocks per stage; every stage but the first halves the resolution.
        width: channels of the first stage.
        inputs: channels of the images.
        classes: outputs.
    """

    def __init__(self, blocks: tuple[int, ...], width: int, inputs: int, classes: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv_norm(inputs, width, 3, 1)
        stages, channels = [], width
        for index, count in enumerate(blocks):
            outputs = width * 2**index
            for block in range(count):
                stride = 2 if index > 0 and block == 0 else 1
                stages.append(BasicBlock(channels, outputs, stride))
                channels = outputs
        self.blocks = nn.Sequential(*stages)
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return self.fc(self.blocks(y).mean((2, 3)))


def resnet8(width: int = 8, inputs: int = 1, classes: int = 10) -> ResNet:
    """Three residual blocks of `width`, 2 `width` and 4 `width` channels, for images of 8 to 32."""
    return ResNet((1, 1, 1), width, inputs, classes)


_FACTORIES: dict[str, Callable[..., nn.Module]] = {"resnet8": resnet8}


def names() -> list[str]:
    """Names that `build` knows."""
    return list(_FACTORIES)


def build(name: str, args: dict[str, Any] | None = None) -> nn.Module:
    """Build a model by name; it remembers name and arguments in `factory` for the files.

    Raises ValueError for an unknown name or arguments that the factory does not take.
    """
    if name not in _FACTORIES:
        raise ValueError(f"models: name={name!r} is unknown; use one of {', '.join(_FACTORIES)}")
    args = dict(args or {})
    try:
        model = _FACTORIES[name](**args)
    except TypeError as error:
        raise ValueError(f"models: {name} does not take {args} ({error})") from error
    model.factory = {"name": name, "args": args}
    return model
