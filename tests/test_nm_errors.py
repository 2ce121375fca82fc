"""What the ops of the `nm` family refuse: every message names op, value, rule and remedy."""

import contextlib

import pytest
import torch

from sparse_cocktail import ops

W = torch.randn(4, 8)
VALUES, BITS = ops.nm_compress(W, 2, 4)
HALF = VALUES.bfloat16()
PACKED, META = ops.nm_pack_weight(W, None, torch.bfloat16)
X, SHORT = torch.zeros(3, 8), torch.zeros(3, 6)
X16 = X.bfloat16()
CONV, CONV_BITS = ops.nm_compress(torch.randn(4, 8, 3, 3), 2, 4)
LONG = torch.zeros(4, 1, 2, dtype=torch.int32)
FAR = VALUES.to("meta"), BITS.to("meta")

ERRORS = {
    "compress_float": (
        ops.nm_compress,
        (W, 2.0, 4),
        TypeError,
        r"n=2.0, m=4 are not both integers",
    ),
    "compress_none": (ops.nm_compress, (W, 2, None), TypeError, r"m=None are not both integers"),
    "compress_list": (ops.nm_compress, ([W], 2, 4), TypeError, r"weight is a list, .*torch.Tensor"),
    "decompress_weight": (
        ops.nm_decompress,
        (VALUES, BITS, 2, 4, W),
        TypeError,
        r"shape is a Tensor.*weight.shape",
    ),
    "linear_float": (ops.nm_linear, (X, VALUES, BITS, 2.0, 4), TypeError, r"n=2.0, m=4 are not"),
    "linear_none": (ops.nm_linear, (None, VALUES, BITS, 2, 4), TypeError, r"x=None .*torch.Tensor"),
    "linear_values": (ops.nm_linear, (X, None, BITS, 2, 4), TypeError, r"values=None .*torch.Tens"),
    "pack_float": (ops.nm_pack, (HALF, BITS, 2.0, 4), TypeError, r"n=2.0 is a float, .*an int"),
    "pack_weight_second": (
        ops.nm_pack_weight,
        (W, torch.bfloat16),
        TypeError,
        r"bits is a dtype, but it must be a torch.Tensor",
    ),
    "compress_dense": (ops.nm_compress, (W, 4, 4), ValueError, r"n=4, m=4 breaks 1 <= n < m <= 32"),
    "compress_zero": (ops.nm_compress, (W, 0, 4), ValueError, r"n=0, m=4 breaks"),
    "compress_wide": (ops.nm_compress, (W, 1, 33), ValueError, r"m=33 breaks"),
    "compress_remainder": (ops.nm_compress, (W, 2, 3), ValueError, r"in=8.*multiple of m=3; pad"),
    "compress_dtype": (ops.nm_compress, (W.int(), 2, 4), TypeError, r"weight .*int32.*convert"),
    "compress_vector": (ops.nm_compress, (W[0], 2, 4), ValueError, r"weight has shape \(8,\)"),
    "compress_to": (
        ops.nm_compress,
        (W, 2, 4, None, torch.int8),
        TypeError,
        r"dtype=torch.int8 is not one of float32, .*pick",
    ),
    "compress_bits": (
        ops.nm_compress,
        (W, 2, 4, LONG),
        ValueError,
        r"\(4, 1, 2\).*\(4, 1, 1\)",
    ),
    "compress_bool": (ops.nm_compress, (W, 2, 4, W > 0), TypeError, r"bits has dtype torch.bool"),
    "decompress_shape": (
        ops.nm_decompress,
        (VALUES, BITS, 2, 4, (4, 12)),
        ValueError,
        r"values have shape \(4, 1, 4\).*\(4, 12\) at 2:4 .*= \(4, 1, 6\)",
    ),
    "decompress_short": (
        ops.nm_decompress,
        (VALUES, BITS, 2, 4, (4,)),
        ValueError,
        r"shape=\(4,\)",
    ),
    "decompress_remainder": (
        ops.nm_decompress,
        (VALUES, BITS, 2, 4, (4, 6)),
        ValueError,
        r"shape has in=6.*m=4",
    ),
    "decompress_dtype": (
        ops.nm_decompress,
        (VALUES.int(), BITS, 2, 4, (4, 8)),
        TypeError,
        r"values have dtype torch.int32",
    ),
    "linear_x": (ops.nm_linear, (SHORT, VALUES, BITS, 2, 4), ValueError, r"\(3, 6\).*in=8 at 2:4"),
    "linear_int": (ops.nm_linear, (X.int(), VALUES, BITS, 2, 4), TypeError, r"x is torch.int32"),
    "linear_double": (
        ops.nm_linear,
        (X.double(), VALUES, BITS, 2, 4),
        TypeError,
        r"float64 and values torch.float32",
    ),
    "linear_conv": (
        ops.nm_linear,
        (X, CONV, CONV_BITS, 2, 4),
        ValueError,
        r"values have shape \(4, 9, 4\)",
    ),
    "linear_bias": (
        ops.nm_linear,
        (X, VALUES, BITS, 2, 4, X[0]),
        ValueError,
        r"bias .*\(8,\).* 4 outputs",
    ),
    "linear_activation": (
        ops.nm_linear,
        (X, VALUES, BITS, 2, 4, None, "tanh"),
        ValueError,
        r"activation='tanh' is unknown; use one of none, relu, gelu",
    ),
    "linear_device": (ops.nm_linear, (X, *FAR, 2, 4), ValueError, r"x is on cpu.*meta; move"),
    "pack_pattern": (ops.nm_pack, (HALF, BITS, 1, 4), ValueError, r"n=1, m=4.*2:4.*nm_linear"),
    "pack_dtype": (ops.nm_pack, (VALUES, BITS, 2, 4), TypeError, r"float32 is not one of bfloat16"),
    "pack_conv": (ops.nm_pack, (CONV, CONV_BITS, 2, 4), ValueError, r"\(4, 9, 4\).*2-D"),
    "pack_inputs": (
        ops.nm_pack,
        (HALF[..., :3], BITS, 1, 2),
        ValueError,
        r"in=6.*multiple of m=4",
    ),
    "pack_weight_dtype": (ops.nm_pack_weight, (W,), TypeError, r"float32 is not one of bfloat16"),
    "pack_weight_conv": (
        ops.nm_pack_weight,
        (torch.zeros(4, 8, 3, 3), None, torch.float16),
        ValueError,
        r"\(4, 8, 3, 3\).*1x1",
    ),
    "packed_out": (
        ops.nm_linear_packed,
        (X16, PACKED, META, 65),
        ValueError,
        r"packed has shape \(4, 1, 2, 32, 8\).*need \(8, 1, 2, 32, 8\)",
    ),
    "packed_dtype": (
        ops.nm_linear_packed,
        (X, PACKED, META, 4),
        TypeError,
        r"x has dtype torch.float32 and packed torch.bfloat16",
    ),
    "packed_kernel": (
        ops.nm_linear_packed,
        (X16, PACKED, META, 4, None, "none", "fast"),
        ValueError,
        r"kernel='fast' is unknown; use one of auto, gemm, skinny, reference",
    ),
    "packed_cpu": (
        ops.nm_linear_packed,
        (X16, PACKED, META, 4, None, "none", "gemm"),
        ValueError,
        r"kernel='gemm' needs CUDA tensors, but x is on cpu; use .*ops.nm_linear",
    ),
}


@pytest.mark.parametrize(("op", "arguments", "error", "match"), ERRORS.values(), ids=ERRORS)
def test_error_names_op_value_and_rule(op, arguments, error, match):
    with pytest.raises(error, match=match) as caught:
        op(*arguments)
    assert str(caught.value).startswith(f"{op.__name__}: ")


# ---- more than n of a group ----------------------------------------------------------------------


def at(level):
    stack = contextlib.ExitStack()
    stack.enter_context(ops.backend("reference" if level == "reference" else "cpp"))
    if level != "reference":
        stack.enter_context(ops.cpu_level(level))
    return stack


@pytest.mark.parametrize("level", ("reference", *ops.cpu_levels()))
@pytest.mark.parametrize("ratio", [(2, 4), (3, 7)], ids=str)
@pytest.mark.parametrize("where", ["first", "last", "padding"])
def test_bits_that_keep_too_many_are_refused(level, ratio, where, threads):
    threads(2)
    n, m = ratio
    weight = torch.randn(700, 9 * m)
    values, bits = ops.nm_compress(weight, n, m)
    broken = bits.clone()
    if where == "padding":  # elements past the last input
        broken[350, 0, -1] |= 1 << 31
    else:
        mask = ops.unpack_mask(bits, weight.shape)
        group = slice(0, m) if where == "first" else slice(8 * m, None)
        mask[0 if where == "first" else -1, group] = True
        broken = ops.pack_mask(mask)
    calls = {
        "nm_compress": lambda: ops.nm_compress(weight, n, m, broken),
        "nm_decompress": lambda: ops.nm_decompress(values, broken, n, m, weight.shape),
        "nm_linear": lambda: ops.nm_linear(weight[:2], values, broken, n, m),
        "nm_linear ": lambda: ops.nm_linear(weight, values, broken, n, m),
    }
    for name, call in calls.items():
        with at(level), pytest.raises((ValueError, RuntimeError)) as caught:
            call()
        message = str(caught.value)
        assert "make them with" in message or "padding bits must be 0" in message, name
