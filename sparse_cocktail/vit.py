"""Vision transformer in plain torch.nn: its projections are linear layers that `convert` masks."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["VisionTransformer"]

_EPS = 1e-6  # of the layer norms, as in the published weights


class Attention(nn.Module):
    """Multi-head self-attention; one linear layer makes queries, keys and values."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # (batch, tokens, 3, heads, size)
        q, k, v = (part.transpose(1, 2) for part in parts.unbind(2))
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout * self.training)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and a two-layer perceptron, each behind a layer norm and beside a shortcut."""

    def __init__(self, width: int, heads: int, mlp: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, _EPS), nn.LayerNorm(width, _EPS)
        self.attention = Attention(width, heads, dropout)
        self.mlp1, self.mlp2 = nn.Linear(width, mlp), nn.Linear(mlp, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x)))
        y = self.dropout(F.gelu(self.mlp1(self.norm2(x))))
        return x + self.dropout(self.mlp2(y))


class VisionTransformer(nn.Module):
    """Patches and a class token through a pre-norm encoder; the class token is classified.

    Dosovitskiy et al., "An image is worth 16x16 words" (ICLR 2021), section 3.1. The blocks lie in
    `encoder`, so `mask_only="encoder"` leaves patch embedding and head dense.

    Args:
        classes: outputs.
        image: height and width of the images in pixels.
        patch: height and width of a patch in pixels.
        width: numbers per token.
        depth: blocks.
        heads: of the attention.
        mlp: inner width of a block's perceptron.
        dropout: share of the tokens' and a branch's values, and of the attention, that is dropped.
        inputs: channels of the images.

    Raises ValueError when patches do not tile the image, or heads do not part the width.
    """

    def __init__(
        self,
        classes: int = 1000,
        image: int = 224,
        patch: int = 16,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        mlp: int = 3072,
        dropout: float = 0.0,
        inputs: int = 3,
    ) -> None:
        super().__init__()
        for name, value, part, by in (
            ("image", image, "patch", patch),
            ("width", width, "heads", heads),
        ):
            if by < 1 or value % by:
                raise ValueError(
                    f"VisionTransformer: {name}={value} is not a multiple of {part}={by}; choose "
                    "one that divides it"
                )
        self.image = image
        self.patches = nn.Conv2d(inputs, width, patch, patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.empty(1, (image // patch) ** 2 + 1, width))
        self.dropout = nn.Dropout(dropout)
        self.encoder = nn.Sequential(*(Block(width, heads, mlp, dropout) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, _EPS)
        self.head = nn.Linear(width, classes)
        self._initialise()

    def _initialise(self) -> None:
        nn.init.trunc_normal_(self.positions, std=0.02)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                patches = module is self.patches  # keeps the variance of its inputs
                std = 1 / math.sqrt(module.weight[0].numel()) if patches else 0.02
                nn.init.trunc_normal_(module.weight, std=std)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-2:] != (self.image, self.image):
            raise ValueError(
                f"VisionTransformer: images are {tuple(x.shape[-2:])}, but positions are for "
                f"({self.image}, {self.image}); resize them, or build it with that image"
            )
        y = self.patches(x).flatten(2).transpose(1, 2)  # (batch, patches, width)
        y = torch.cat([self.token.expand(len(y), -1, -1), y], dim=1) + self.positions
        y = self.encoder(self.dropout(y))
        return self.head(self.norm(y[:, 0]))
