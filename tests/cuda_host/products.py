"""Products that drivers of the emulator compute, and what they must be."""

from functools import cached_property

import torch
from nm_cases import bits_of, masked, weight_of

from sparse_cocktail import reference_nm

DTYPES = (torch.bfloat16, torch.float16)
ACTIVATIONS = ("none", "relu", "gelu")


def framed(tensor):
    """A copy inside NaN: what is read beside it spoils the result."""
    frame = tensor.new_full((tensor.numel() + 64,), float("nan"))
    inner = frame[32 : 32 + tensor.numel()].view(tensor.shape)
    inner.copy_(tensor)
    return inner


class Product:
    """One product y = act(x W^T + bias); many groups of the weight keep one value or none."""

    def __init__(self, out, rows, inputs, dtype, integers=False, bias=None, activation="none"):
        generator = torch.Generator().manual_seed(out + rows + inputs)
        weight = weight_of(out, inputs)
        if not integers:
            weight = torch.randn(out, inputs, generator=generator)
        bits = bits_of(out, inputs, seed=rows)
        self.weight = masked(weight.to(dtype), bits)
        self.packed, self.meta = map(
            torch.Tensor.contiguous, reference_nm.nm_pack_weight(weight.to(dtype), bits)
        )
        x = torch.randn(rows, inputs, generator=generator)
        self.x = framed((torch.randint(-2, 3, x.shape) if integers else x).to(dtype))
        self.bias = None if bias is None else torch.randn(out, generator=generator).to(bias)
        self.activation, self.dtype = activation, dtype
        self.out, self.rows, self.inputs = out, rows, inputs

    def run(self, driver, name, *how, order=0, shared_limit=0, scratch=None):
        y = framed(torch.full((self.rows, self.out), float("nan"), dtype=self.dtype))
        operands = (self.x, self.packed, self.meta, y, self.bias)
        driver.prepare(*operands, scratch, order=order, shared_limit=shared_limit)
        driver.run(
            name,
            self.dtype == torch.bfloat16,
            *operands[:4],
            self.rows,
            self.inputs,
            self.out,
            self.bias,
            self.bias is not None and self.bias.dtype == torch.float32,
            ACTIVATIONS.index(self.activation),
            *how,
        )
        return y

    def _run_split(self, driver, name, form, split, **options):
        partial = torch.full((split if split > 1 else 0, self.rows, self.out), float("nan"))
        return self.run(driver, name, form, split, partial, scratch=partial, **options)

    def run_gemm(self, driver, tile, split=1, **options):
        return self._run_split(driver, "nm_gemm_sm80", tile, split, **options)

    def run_skinny(self, driver, blocks, split, **options):
        return self._run_split(driver, "nm_skinny", blocks, split, **options)

    def exact(self, dtype=torch.float64):
        bias = None if self.bias is None else self.bias.to(dtype)
        return reference_nm.activated(
            torch.nn.functional.linear(self.x.to(dtype), self.weight.to(dtype), bias),
            self.activation,
        )

    @cached_property
    def expected(self):
        """The exact result, and the error of torch: sums in fp32, one rounding."""
        exact = self.exact()
        return exact, (self.exact(torch.float32).to(self.dtype).double() - exact).abs().max()

    def check(self, y):
        """At most twice the error of torch."""
        exact, allowed = self.expected
        error = (y.double() - exact).abs().max()
        assert error <= 2 * allowed + 1e-7, f"error {error:.3g}, torch's is {allowed:.3g}"
