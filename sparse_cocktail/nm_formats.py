"""Conversions between the forms of a 2:4 weight (out, in), each with a validator.

    compressed  `values` (out, 1, in / 2) and `bits` int32 (out, 1, ceil(in / 32)): the saved form.
                The kept values of each group of four in order, zeros at the group's end. Of a
                1:2 weight (n=1, m=2) the same for pairs; its other forms are those of 2:4.
    nibbles     uint8 (out, ceil(in / 8)), two groups per byte, the lower one in the low four bits.
                A nibble is i0 | i1 << 2 with the indices i0 < i1 of a group's two values; where
                fewer are kept, zeros take the lowest free indices. Legal: 4, 8, 9, c, d, e.
    packed      what our tensor-core kernels read, the map of csrc/common/nm_fragments.h:
                `packed` 16 bit (MB, KB, 2, 32, 8) and `meta` int32 (MB, KB, 32), where
                MB = 4 ceil(out / 64) and KB = ceil(in / 64); padding is zero, with nibble 4.
    cutlass     what PyTorch's CUTLASS kernels read, the parts of SparseSemiStructuredTensorCUTLASS:
                `values` (out, in / 2) and `meta` int16 (out, in / 16), reordered.

Zeros are not told apart from padding by the last two, so from there a kept 0.0 or -0.0 comes back
as not kept. All functions take tensors of any device; those that check values wait for it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ops

__all__ = [
    "bits_to_nibbles",
    "from_cutlass",
    "from_packed",
    "from_semi_structured",
    "nibbles_to_bits",
    "to_cutlass",
    "to_packed",
    "to_semi_structured",
    "validate_compressed",
    "validate_cutlass",
    "validate_nibbles",
    "validate_packed",
]

DTYPES = (torch.bfloat16, torch.float16)
EMPTY = 0x4  # of a group that keeps nothing
# Nibbles of the 16 masks of a group, bit i for element i; masks of more than two bits are refused.
NIBBLES = (4, 4, 4, 4, 8, 8, 9, 0, 12, 12, 13, 0, 14, 0, 0, 0)
# PyTorch pads groups with fewer than two values in another way. Both are legal.
NIBBLES_OF_TORCH = (14, 8, 9, 4, 14, 8, 9, 0, 14, 12, 13, 0, 14, 0, 0, 0)
LEGAL = (4, 8, 9, 12, 13, 14)


# ---- groups of four ------------------------------------------------------------------------------


def _table(entries: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(entries, dtype=torch.uint8, device=device)


def _shifts(count: int, device: torch.device) -> Tensor:
    return torch.arange(0, 4 * count, 4, dtype=torch.int32, device=device)


def _masks(bits: Tensor, inputs: int) -> Tensor:
    """Mask bits (out, 1, words) as one number 0 ... 15 per group: int64 (out, in / 4)."""
    nibbles = bits.unsqueeze(-1) >> _shifts(8, bits.device) & 15
    return nibbles.flatten(1)[:, : inputs // 4].long()


def _bits(masks: Tensor) -> Tensor:
    """The mask bits of one number per group."""
    out, groups = masks.shape
    padded = F.pad(masks.long(), (0, -groups % 8)).view(out, 1, -1, 8)
    return _signed((padded << _shifts(8, masks.device)).sum(-1), 32)


def _signed(words: Tensor, width: int) -> Tensor:
    """Unsigned numbers of 16 or 32 bits, held in int64, as int16 or int32 with the same bits."""
    half = 1 << (width - 1)
    return ((words + half) % (2 * half) - half).to(torch.int32 if width == 32 else torch.int16)


def _in_place(values: Tensor, masks: Tensor, nibbles: Tensor, m: int) -> Tensor:
    """Compressed values (out, 1, in / 2) as (out, in / 4, 2), each where its nibble says."""
    places = torch.stack((nibbles & 3, nibbles >> 2), -1).long()
    kept = masks.unsqueeze(-1) >> places & 1 == 1
    # of 1:2, each pair has its slot, kept or not; of 2:4, slots fill from the first
    second = kept[..., :1].long()
    slots = places >> 1 if m == 2 else torch.cat((torch.zeros_like(second), second), -1)
    found = values.view(len(values), -1, 2).gather(-1, slots)
    return torch.where(kept, found, found.new_zeros(()))


def _compressed(pairs: Tensor, nibbles: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse: (out, in / 4, 2) at the nibbles' places as values and bits, without zeros."""
    first, second = (pairs != 0).unbind(-1)
    zero = pairs.new_zeros(())
    left = torch.where(first, pairs[..., 0], torch.where(second, pairs[..., 1], zero))
    right = torch.where(first & second, pairs[..., 1], zero)
    masks = (first.long() << (nibbles & 3).long()) | (second.long() << (nibbles >> 2).long())
    return torch.stack((left, right), -1).view(len(pairs), 1, -1), _bits(masks)


# ---- checks --------------------------------------------------------------------------------------


def _check_inputs(op: str, inputs: int) -> None:
    if inputs < 0 or inputs % 4:
        raise ValueError(
            f"{op}: in={inputs} is not a multiple of m=4; pad the layer or leave it dense"
        )


def _check_tensor(op: str, name: str, tensor: Tensor, shape: tuple, dtypes: tuple) -> None:
    if tensor.dtype not in dtypes:
        known = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{op}: {name} has dtype {tensor.dtype}, but it is {known}; convert it")
    if tuple(tensor.shape) != shape or not tensor.is_contiguous():
        raise ValueError(
            f"{op}: {name} has shape {tuple(tensor.shape)} and strides {tensor.stride()}, but it "
            f"is contiguous of shape {shape}; give the sizes that it was made with"
        )


def _check_legal(op: str, name: str, nibbles: Tensor) -> None:
    if nibbles.numel() == 0:
        return
    legal = torch.zeros(16, dtype=torch.bool, device=nibbles.device)
    legal[list(LEGAL)] = True
    wrong = ~legal[nibbles.long()]
    if wrong.any():
        row, group = (int(i) for i in wrong.nonzero()[0])
        raise ValueError(
            f"{op}: {name} has nibble {int(nibbles[row, group]):#x} at row {row}, group {group}, "
            "but a nibble is i0 | i1 << 2 with i0 < i1, one of 4, 8, 9, c, d, e; make it again "
            "from the mask with nm_formats.bits_to_nibbles or ops.nm_pack"
        )


def _check_bits(op: str, bits: Tensor, inputs: int, n: int = 2, m: int = 4) -> Tensor:
    """Refuses bits that do not fit; the masks of their groups of four."""
    if bits.dim() != 3 or bits.shape[1] != 1:
        raise ValueError(
            f"{op}: bits have shape {tuple(bits.shape)}, but a 2:4 form has bits (out, 1, "
            "ceil(in / 32)), of a linear or 1x1 convolution; other convolutions stay dense"
        )
    _check_inputs(op, inputs)
    _check_tensor(op, "bits", bits, (len(bits), 1, -(-inputs // 32)), (torch.int32,))
    if inputs % 32 and bits.numel() and (bits[..., -1] >> inputs % 32).any():
        raise ValueError(
            f"{op}: bits are set beyond in={inputs}; padding bits must be 0: make them with "
            "ops.pack_mask(mask)"
        )
    masks = _masks(bits, inputs)
    counts = torch.stack([masks >> i & 1 for i in range(4)], -1).unflatten(-1, (-1, m)).sum(-1)
    if (counts > n).any():
        row, group = (int(i) for i in (counts > n).any(-1).nonzero()[0])
        raise ValueError(
            f"{op}: bits of row {row} keep more than n={n} of a group of m={m} in columns "
            f"{4 * group} to {4 * group + 3}; make bits with ops.nm_mask(weight, {n}, {m})"
        )
    return masks


def validate_compressed(values: Tensor, bits: Tensor, n: int = 2, m: int = 4) -> None:
    """Refuse what is not a 2:4 or 1:2 weight of values (out, 1, in / 2) and bits."""
    _compressed_masks("validate_compressed", values, bits, n, m)


def _compressed_masks(op: str, values: Tensor, bits: Tensor, n: int, m: int) -> Tensor:
    if (n, m) not in ((2, 4), (1, 2)):
        raise ValueError(
            f"{op}: n={n}, m={m}, but 2:4 has these forms, and 1:2 as such; use ops.nm_linear for "
            "other patterns"
        )
    if values.dim() != 3 or values.shape[1] != 1:
        raise ValueError(
            f"{op}: values have shape {tuple(values.shape)}, but a 2:4 form has values (out, 1, "
            "in / 2), of a linear or 1x1 convolution; other convolutions stay dense"
        )
    _check_tensor(op, "values", values, tuple(values.shape), DTYPES)
    if len(bits) != len(values):
        raise ValueError(
            f"{op}: bits have {len(bits)} rows, but values have {len(values)}; both come from one "
            "ops.nm_compress"
        )
    return _check_bits(op, bits, 2 * values.shape[2], n, m)


# ---- nibbles -------------------------------------------------------------------------------------


def bits_to_nibbles(bits: Tensor, inputs: int) -> Tensor:
    """2:4 mask bits (out, 1, ceil(in / 32)) to nibbles uint8 (out, ceil(in / 8))."""
    masks = _check_bits("bits_to_nibbles", bits, inputs)
    nibbles = F.pad(_table(NIBBLES, bits.device)[masks], (0, masks.shape[1] % 2), value=EMPTY)
    return nibbles[:, ::2] | nibbles[:, 1::2] << 4


def nibbles_to_bits(nibbles: Tensor, inputs: int) -> Tensor:
    """Nibbles to mask bits, exactly two set per group: padding cannot be told from values."""
    validate_nibbles(nibbles, inputs)
    groups = _split(nibbles, inputs // 4).long()
    return _bits((1 << (groups & 3)) | (1 << (groups >> 2)))


def _split(nibbles: Tensor, groups: int) -> Tensor:
    """One nibble per element, uint8 (out, groups)."""
    return torch.stack((nibbles & 15, nibbles >> 4), -1).flatten(1)[:, :groups]


def validate_nibbles(nibbles: Tensor, inputs: int) -> None:
    """Refuse nibbles of another shape or dtype, or that no group of 2:4 has."""
    op = "validate_nibbles"
    _check_inputs(op, inputs)
    rows = nibbles.shape[0] if nibbles.dim() else 0
    _check_tensor(op, "nibbles", nibbles, (rows, -(-inputs // 8)), (torch.uint8,))
    _check_legal(op, "nibbles", _split(nibbles, inputs // 4))
    if inputs % 8 and rows and (nibbles[:, -1] >> 4 != EMPTY).any():
        raise ValueError(
            f"{op}: nibbles end with a half byte beyond in={inputs} that is not {EMPTY:#x}; make "
            "them with nm_formats.bits_to_nibbles"
        )


# ---- packed --------------------------------------------------------------------------------------


def _blocks(out: int, inputs: int) -> tuple[int, int]:
    return 4 * -(-out // 64), -(-inputs // 64)


def to_packed(values: Tensor, bits: Tensor, n: int = 2, m: int = 4) -> tuple[Tensor, Tensor]:
    """Compressed values and bits to (packed, meta): ops.nm_pack after the checks of here."""
    _compressed_masks("to_packed", values, bits, n, m)
    return ops.nm_pack(values, bits, n, m)


def _unpacked(packed: Tensor, meta: Tensor) -> tuple[Tensor, Tensor]:
    """Values (rows, groups, 2) and nibbles (rows, groups), with all padding."""
    row_blocks, column_blocks = packed.shape[:2]
    parts = packed.view(row_blocks, column_blocks, 2, 8, 4, 2, 2, 2).permute(0, 6, 3, 1, 2, 5, 4, 7)
    pairs = parts.reshape(16 * row_blocks, -1, 2)
    nibbles = (meta.unsqueeze(-1) >> _shifts(8, meta.device) & 15).to(torch.uint8)
    parts = nibbles.view(row_blocks, column_blocks, 8, 4, 2, 4).permute(0, 4, 2, 1, 3, 5)
    return pairs, parts.reshape(16 * row_blocks, -1)


def from_packed(packed: Tensor, meta: Tensor, out: int, inputs: int) -> tuple[Tensor, Tensor]:
    """(packed, meta) to compressed values (out, 1, in / 2) and bits (out, 1, ceil(in / 32))."""
    validate_packed(packed, meta, out, inputs)
    pairs, nibbles = _unpacked(packed, meta)
    return _compressed(pairs[:out, : inputs // 4], nibbles[:out, : inputs // 4])


def validate_packed(packed: Tensor, meta: Tensor, out: int, inputs: int) -> None:
    """Refuse other shapes and dtypes, nibbles that are not legal, and padding that is not empty."""
    op = "validate_packed"
    _check_inputs(op, inputs)
    row_blocks, column_blocks = _blocks(out, inputs)
    _check_tensor(op, "packed", packed, (row_blocks, column_blocks, 2, 32, 8), DTYPES)
    _check_tensor(op, "meta", meta, (row_blocks, column_blocks, 32), (torch.int32,))
    pairs, nibbles = _unpacked(packed, meta)
    _check_legal(op, "meta", nibbles)
    for name, tensor, empty in (("packed", pairs, 0), ("meta", nibbles, EMPTY)):
        for what, part in (("rows", tensor[out:]), ("columns", tensor[:, inputs // 4 :])):
            if (part != empty).any():
                raise ValueError(
                    f"{op}: {name} has padding {what} beyond ({out}, {inputs}) that are not "
                    f"{'zero' if name == 'packed' else 'nibble 0x4'}; give the sizes that it was "
                    "packed with, or pack it again with ops.nm_pack"
                )


# ---- PyTorch's CUTLASS layout --------------------------------------------------------------------


def to_cutlass(values: Tensor, bits: Tensor, n: int = 2, m: int = 4) -> tuple[Tensor, Tensor]:
    """Compressed values and bits to the parts of a SparseSemiStructuredTensorCUTLASS.

    Equal to the last bit to what PyTorch makes from the dense weight where no kept value is zero.

    Returns:
        values (out, in / 2) and meta int16 (out, in / 16).
    """
    op = "to_cutlass"
    masks = _compressed_masks(op, values, bits, n, m)
    _check_cutlass_sizes(op, len(values), 2 * values.shape[2])
    nibbles = _table(NIBBLES_OF_TORCH, bits.device)[masks]
    words = (nibbles.long().unflatten(1, (-1, 4)) << _shifts(4, bits.device)).sum(-1)
    # Rows 16 b1 + 8 b0 + e of 32, words 2 p + q: all p apart, then lines of e, b1, q, b0.
    parts = _signed(words, 16).unflatten(0, (-1, 2, 2, 8)).unflatten(-1, (-1, 2))
    meta = parts.permute(4, 0, 3, 1, 5, 2).reshape(len(values), -1)
    return _in_place(values, masks, nibbles, m).flatten(1), meta


def from_cutlass(values: Tensor, meta: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse: compressed values (out, 1, in / 2) and bits (out, 1, ceil(in / 32))."""
    validate_cutlass(values, meta)
    return _compressed(values.unflatten(1, (-1, 2)), _cutlass_nibbles(meta))


def _cutlass_nibbles(meta: Tensor) -> Tensor:
    out, words = meta.shape
    parts = meta.view(words // 2, out // 32, 8, 2, 2, 2).permute(1, 3, 5, 2, 0, 4)
    nibbles = parts.reshape(out, words, 1).int() >> _shifts(4, meta.device) & 15
    return nibbles.flatten(1).to(torch.uint8)


def _check_cutlass_sizes(op: str, out: int, inputs: int) -> None:
    if out == 0 or inputs == 0 or out % 32 or inputs % 64:
        raise ValueError(
            f"{op}: the weight is ({out}, {inputs}), but PyTorch's layout needs multiples of "
            "(32, 64); pad the layer, or use ops.nm_pack, which pads by itself"
        )


def validate_cutlass(values: Tensor, meta: Tensor) -> None:
    """Refuse other shapes and dtypes, and metadata with nibbles that are not legal."""
    op = "validate_cutlass"
    if values.dim() != 2:
        raise ValueError(
            f"{op}: values have shape {tuple(values.shape)}, but they are (out, in / 2); pass "
            "tensor.packed of a SparseSemiStructuredTensorCUTLASS"
        )
    out, half = values.shape
    _check_cutlass_sizes(op, out, 2 * half)
    _check_tensor(op, "values", values, (out, half), DTYPES)
    _check_tensor(op, "meta", meta, (out, half // 8), (torch.int16,))
    _check_legal(op, "meta", _cutlass_nibbles(meta))


def to_semi_structured(values: Tensor, bits: Tensor, n: int = 2, m: int = 4) -> Tensor:
    """Compressed values and bits as a torch.sparse.SparseSemiStructuredTensorCUTLASS.

    It can be made and read on any device; PyTorch multiplies with it on CUDA cards before Hopper.
    """
    packed, meta = to_cutlass(values, bits, n, m)
    shape = torch.Size((packed.shape[0], 2 * packed.shape[1]))
    return torch.sparse.SparseSemiStructuredTensorCUTLASS(shape, packed, meta, None, None, None)


def from_semi_structured(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """A SparseSemiStructuredTensorCUTLASS as compressed values and bits.

    Raises:
        TypeError: a cuSPARSELt tensor, whose layout is private and differs between cards.
    """
    op = "from_semi_structured"
    if isinstance(tensor, torch.sparse.SparseSemiStructuredTensorCUSPARSELT):
        raise TypeError(
            f"{op}: tensor is a SparseSemiStructuredTensorCUSPARSELT, whose layout is private to "
            "cuSPARSELt; call its to_dense() on the card that made it, then ops.nm_compress"
        )
    if not isinstance(tensor, torch.sparse.SparseSemiStructuredTensorCUTLASS):
        raise TypeError(
            f"{op}: tensor is a {type(tensor).__name__}, not a SparseSemiStructuredTensorCUTLASS; "
            "compress a dense weight with ops.nm_compress(weight, 2, 4)"
        )
    if tensor.packed is None or tensor.meta is None:
        raise ValueError(
            f"{op}: tensor of shape {tuple(tensor.shape)} holds only its transpose; pass tensor.t()"
        )
    return from_cutlass(tensor.packed.detach(), tensor.meta)
