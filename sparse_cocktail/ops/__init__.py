"""The ops of `torch.ops.sparse_cocktail`, with checked and documented Python signatures."""

from .dispatch import (
    BACKENDS,
    backend,
    chosen,
    cpu_level,
    cpu_levels,
    defined,
    extension_path,
    implementations,
)
from .masked import live_rows, masked_copy_, masked_weight, masked_weight_, masked_weights
from .masked_conv import masked_conv2d
from .masked_linear import autocast_dtype, masked_linear
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
from .nm import nm_compress, nm_decompress, nm_linear
from .nm_packed import nm_linear_packed, nm_pack, nm_pack_weight
from .routes import ROUTES, route
from .rows import nm_row_, topk_row_, unified_rows_, workspace
from .soft_topk import soft_topk, soft_topk_multi
from .sparse_product import sparse_conv2d, sparse_linear, sparse_pack
from .unified import channel_masks, channel_scores, unified_masks

__all__ = [
    "BACKENDS",
    "ROUTES",
    "autocast_dtype",
    "backend",
    "block_masks",
    "channel_masks",
    "channel_scores",
    "chosen",
    "cpu_level",
    "cpu_levels",
    "defined",
    "extension_path",
    "implementations",
    "live_rows",
    "mask_and",
    "mask_andnot",
    "mask_count",
    "mask_or",
    "masked_conv2d",
    "masked_copy_",
    "masked_linear",
    "masked_weight",
    "masked_weight_",
    "masked_weights",
    "nm_compress",
    "nm_decompress",
    "nm_linear",
    "nm_linear_packed",
    "nm_mask",
    "nm_pack",
    "nm_pack_weight",
    "nm_row_",
    "pack_mask",
    "route",
    "soft_topk",
    "soft_topk_multi",
    "sparse_conv2d",
    "sparse_linear",
    "sparse_pack",
    "topk_masks",
    "topk_row_",
    "unified_masks",
    "unified_rows_",
    "unpack_mask",
    "workspace",
]
