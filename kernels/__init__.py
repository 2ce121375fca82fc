"""Triton kernels, installed as `sparse_cocktail.kernels`.

    plan.py     how a list of weights is cut into tiles; tables and scratch memory (plain torch)
    tiles.py    what all kernels share: reading a tile as keys, words of bits, N:M, fixed point
    sweep.py    the one pass over the weights: sure bits, candidates, N:M bits, channel scores
    bracket.py  sample of the keys, and the bracket around the threshold
    select.py   the small kernels after it that make the top-k exact
    channels.py scores of channels and blocks, choice of channels
    simple.py   pack, unpack, count, N:M alone, masked weights
    masked_tiles.py   of the masked products: tile sizes, words of bits to registers, geometry
    masked_linear.py  masked matrix product and its two gradients
    masked_conv.py    the same as convolution, and without tensor cores for groups of few channels
    nm.py        compress and decompress, for every n < m <= 32
    nm_linear.py product of a compressed weight, its values spread in registers
    soft_topk.py soft top-k masks: the launches of a search, and the writing of masks
    soft_grad.py      their gradient
    soft_root.py      one step of the search
    soft_tiles.py     its table of tensors, and masks of a block
    launch.py   the order in which the kernels of one selection run

Nothing here is imported before a Triton op is called.
"""
