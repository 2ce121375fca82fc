"""The ops of `torch.ops.sparse_cocktail`, with checked and documented Python signatures."""

from .dispatch import BACKENDS, backend, extension_path, implementations
from .masked import masked_conv2d, masked_linear, masked_weight, masked_weights
from .masks import (
    block_masks,
    mask_and,
    mask_andnot,
    mask_count,
    mask_or,
    nm_mask,
    pack_mask,
    topk_masks,
    unpack_mask,
)
from .unified import channel_masks, channel_scores, unified_masks

__all__ = [
    "BACKENDS",
    "backend",
    "block_masks",
    "channel_masks",
    "channel_scores",
    "extension_path",
    "implementations",
    "mask_and",
    "mask_andnot",
    "mask_count",
    "mask_or",
    "masked_conv2d",
    "masked_linear",
    "masked_weight",
    "masked_weights",
    "nm_mask",
    "pack_mask",
    "topk_masks",
    "unified_masks",
    "unpack_mask",
]
