"""Triton kernels, installed as `sparse_cocktail.kernels`. Each file is one family of ops."""
