"""Every op: opcheck, the choice of backend, and errors that name op, argument, value and rule."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sparse_cocktail import ops

NAMESPACE = torch.ops.sparse_cocktail


def defined_ops():
    names = torch._C._dispatch_get_all_op_names()
    return sorted(n.partition("::")[2] for n in names if n.startswith("sparse_cocktail::"))


def weight_of(*shape, dtype=torch.float32, grad=True):
    return torch.randn(shape, dtype=dtype).requires_grad_(grad)


def bits_of(*shape):
    return ops.pack_mask(torch.rand(shape) < 0.5)


def channels_last(tensor):
    return tensor.detach().to(memory_format=torch.channels_last).requires_grad_()


# ---- opcheck -------------------------------------------------------------------------------------


def rows_and_bits(*shape):
    """Bits that leave outputs 0 and 2 only, and these outputs."""
    bits = bits_of(*shape)
    bits[1], bits[3:] = 0, 0
    return bits, torch.tensor([0, 2])


def _linear_samples():
    yield weight_of(3, 5), weight_of(4, 5), bits_of(4, 5), None, None, False
    yield weight_of(5), weight_of(4, 5), bits_of(4, 5), weight_of(4), None, True
    yield weight_of(0, 5), weight_of(4, 5), bits_of(4, 5), weight_of(4), None, False
    yield weight_of(5, 2, 3).permute(2, 1, 0), weight_of(4, 5), bits_of(4, 5), None, None, False
    x = weight_of(2, 3, 33, dtype=torch.bfloat16)
    yield x, weight_of(7, 33), bits_of(7, 33), weight_of(7), None, False
    bits, rows = rows_and_bits(7, 33)
    yield x, weight_of(7, 33), bits, weight_of(7), rows, False


def _linear_input_grad_samples():
    bits, rows = rows_and_bits(4, 5)
    yield weight_of(3, 4), weight_of(4, 5), bits_of(4, 5), None
    yield weight_of(2, 0, 4), weight_of(4, 5), bits_of(4, 5), None
    yield weight_of(4, dtype=torch.bfloat16), weight_of(4, 5), bits, rows


def _linear_weight_grad_samples():
    bits, rows = rows_and_bits(4, 5)
    half = torch.bfloat16
    yield weight_of(3, 4), weight_of(3, 5), weight_of(4, 5), bits_of(4, 5), None, False
    yield weight_of(2, 3, 4), weight_of(2, 3, 5), weight_of(5, 4).t(), bits_of(4, 5), None, True
    yield weight_of(3, 4, dtype=half), weight_of(3, 5, dtype=half), weight_of(4, 5), bits, rows, 0


PLAIN = [1, 1, 0, 0, 1, 1, 1]  # stride, padding, dilation, groups
PADDED = [1, 1, 1, 1, 1, 1, 1]


def _conv_samples():
    x, weight, bits = weight_of(2, 4, 6, 7), weight_of(6, 4, 3, 3), bits_of(6, 4, 3, 3)
    yield x, weight, bits, None, None, PLAIN, False
    yield x, weight, bits, weight_of(6), None, [2, 1, 1, 2, 1, 2, 1], True
    yield x, weight_of(6, 2, 3, 3), bits_of(6, 2, 3, 3), None, None, [*PADDED[:-1], 2], False
    last = channels_last(x), channels_last(weight)
    yield *last, bits, weight_of(6), None, PADDED, False
    half = weight_of(2, 4, 6, 7, dtype=torch.bfloat16)
    yield half, channels_last(weight), bits, weight_of(6), None, PADDED, False
    live, rows = rows_and_bits(6, 4, 3, 3)
    yield x, weight, live, weight_of(6), rows, [2, *PADDED[1:]], False
    yield *last, live, None, rows, PADDED, False


def _conv_grad_samples():
    """A gradient of the output before the arguments that the layer had."""
    for x, weight, bits, _, rows, geometry, dense_grad in _conv_samples():
        stride, padding, dilation, groups = (geometry[i : i + 2] for i in (0, 2, 4, 6))
        y = F.conv2d(x, weight.to(x.dtype), None, stride, padding, dilation, *groups)
        yield torch.randn_like(y).requires_grad_(), x, weight, bits, rows, geometry, dense_grad


def _weight_samples():
    yield weight_of(5, 33), bits_of(5, 33), None
    yield weight_of(5, 33), bits_of(5, 33), torch.bfloat16
    yield channels_last(weight_of(4, 5, 3, 3)), bits_of(4, 5, 3, 3), None
    yield weight_of(4, 5, 3, 3).transpose(0, 1), bits_of(5, 4, 3, 3), None
    conv3d = weight_of(2, 5, 3, 3, 3).detach().to(memory_format=torch.channels_last_3d)
    yield conv3d.requires_grad_(), bits_of(2, 5, 3, 3, 3), None
    yield weight_of(8, 10)[::2, 1:6], bits_of(4, 5), None


def _lists():
    weights = [weight_of(4, 8, grad=False), weight_of(6, 36, 3, 1, grad=False)]
    return weights, [bits_of(*w.shape) for w in weights]


def _unified_samples():
    weights, bits = _lists()
    yield weights, 50, [2, 4], [3, 1], 0.8, None, None
    yield weights, 50, [], [3, 1], 0.5, bits, bits


def _topk_samples():
    weights, bits = _lists()
    yield weights, [50], None
    yield weights, [5, 40], bits
    yield [], [0], None


def _rows():
    """Weights, a count, three rows and scratch for in-place selections."""
    weights, _ = _lists()
    rows = [torch.zeros(4 + 6 * 3 * 2, dtype=torch.int32) for _ in range(3)]
    return weights, torch.tensor(50), rows, ops.workspace(weights)


def _topk_row_samples():
    weights, keep, (row, within, _), scratch = _rows()
    yield weights, keep, None, row, scratch
    yield weights, keep, within.fill_(3), row, scratch


def _unified_rows_samples():
    weights, keep, (u, n, c), scratch = _rows()
    channels = torch.tensor([3, 1])
    yield weights, keep, [2, 4], channels, 0.8, None, None, u, n, c, scratch
    yield weights, keep, [], channels, 0.5, None, n, u, None, c, scratch


def _sparse(weight, bits):
    return ops.sparse_pack(weight, bits)


def _compressed(*shape, n=2, m=4, grad=True, **options):
    """Values that may ask for a gradient, and bits, of a random weight."""
    values, bits = ops.nm_compress(torch.randn(shape), n, m, **options)
    return values.requires_grad_(grad), bits


def _compress_samples():
    yield weight_of(3, 8), 2, 4, None, None
    yield weight_of(3, 8), 2, 4, ops.nm_mask(weight_of(3, 8), 1, 4), torch.bfloat16
    yield channels_last(weight_of(3, 36, 3, 3)), 1, 3, None, None
    yield weight_of(3, 8, 2, 2), 3, 8, None, None


def _nm_linear_samples():
    yield weight_of(3, 8), *_compressed(5, 8), 2, 4, weight_of(5), "none"
    yield weight_of(36), *_compressed(5, 36, n=1, m=3), 1, 3, None, "gelu"
    half = _compressed(5, 40, n=4, m=8, dtype=torch.bfloat16)
    yield weight_of(2, 3, 40, dtype=torch.bfloat16), *half, 4, 8, weight_of(5), "relu"
    yield weight_of(20, 8), *_compressed(5, 8, dtype=torch.float16), 2, 4, None, "none"


def _packed(*shape, dtype=torch.bfloat16):
    return ops.nm_pack_weight(torch.randn(shape), dtype=dtype)


def _packed_samples():
    half = torch.bfloat16
    yield weight_of(3, 8, dtype=half), *_packed(5, 8), 5, weight_of(5), "none", "auto"
    yield weight_of(2, 3, 68, dtype=half), *_packed(70, 68), 70, None, "gelu", "auto"
    yield weight_of(8, dtype=half), *_packed(5, 8), 5, None, "relu", "reference"


def _soft_topk_samples():
    values = [weight_of(4, 8), channels_last(weight_of(6, 3, 3, 3))]
    each = torch.rand(4, 8) + 0.5
    yield values, None, 50.0, 3.0, None
    yield values, [each, torch.tensor(2.0)], 50.0, 3.0, torch.zeros(2, dtype=torch.float64)
    yield [weight_of(7, dtype=torch.bfloat16)], None, 7.0, 1.0, None
    yield [weight_of(5, dtype=torch.float64), weight_of(0, dtype=torch.float64)], None, 2.5, 0, None


def _soft_topk_grad_samples():
    masks, costs = [torch.rand(4, 8), torch.rand(5)], [torch.rand(4, 8) + 0.5, torch.tensor(2.0)]
    grads = [torch.randn(8, 4).t(), torch.randn(5)]
    yield grads, masks, None, 3.0, torch.float32
    yield grads, masks, costs, 3.0, torch.bfloat16


SAMPLES = {
    "block_masks": lambda: [
        (_lists()[0], [3], [2, 4], None),
        (_lists()[0], [3, 4], [1, -1], _lists()[1]),
    ],
    "channel_masks": lambda: [([torch.arange(4), torch.arange(3)], [2, 1], [9, 1], [5, 40])],
    "channel_scores": lambda: [(*_lists(), _lists()[1], 0.8)],
    "mask_and": lambda: [(bits_of(3, 40), bits_of(3, 40))],
    "mask_andnot": lambda: [(bits_of(3, 40), bits_of(3, 40))],
    "mask_count": lambda: [(bits_of(3, 40),), (bits_of(3, 40).flatten(),)],
    "mask_or": lambda: [(bits_of(3, 40), bits_of(3, 40))],
    "masked_conv2d": _conv_samples,
    "masked_conv2d_input_grad": lambda: [arguments[:-1] for arguments in _conv_grad_samples()],
    "masked_conv2d_weight_grad": _conv_grad_samples,
    "masked_copy_": lambda: [
        ([weight_of(5, 33, grad=False)], [weight_of(5, 33)], [bits_of(5, 33)]),
        (*([w.detach() for w in weights] for weights in (_lists()[0], _lists()[0])), _lists()[1]),
    ],
    "masked_linear": _linear_samples,
    "masked_linear_input_grad": _linear_input_grad_samples,
    "masked_linear_weight_grad": _linear_weight_grad_samples,
    "masked_weight": _weight_samples,
    "masked_weight_": lambda: [
        (weight_of(5, 33, grad=False), bits_of(5, 33)),
        (channels_last(weight_of(4, 5, 3, 3)).detach(), bits_of(4, 5, 3, 3)),
        (weight_of(8, 10, grad=False)[::2, 1:6], bits_of(4, 5)),
    ],
    "masked_weights": lambda: [
        ([weight_of(4, 8), weight_of(6, 36, 3, 1)], _lists()[1], dtype, dense_grad)
        for dtype, dense_grad in ((None, False), (torch.bfloat16, True))
    ],
    "nm_compress": _compress_samples,
    "nm_decompress": lambda: [
        (*_compressed(3, 8), 2, 4, [3, 8]),
        (*_compressed(3, 36, 2, 3, n=1, m=3), 1, 3, [3, 36, 2, 3]),
    ],
    "nm_linear": _nm_linear_samples,
    "nm_linear_packed": _packed_samples,
    "nm_mask": lambda: [
        (weight_of(3, 8, 3, 3), 2, 4),
        (channels_last(weight_of(3, 8, 3, 3)), 1, 2),
    ],
    "nm_pack": lambda: [
        (*_compressed(5, 12, grad=False, dtype=torch.bfloat16), 2, 4),
        (*_compressed(70, 68, n=1, m=2, grad=False, dtype=torch.float16), 1, 2),
    ],
    "nm_pack_weight": lambda: [
        (weight_of(5, 12, grad=False), None, torch.bfloat16),
        (weight_of(70, 68, grad=False).half(), ops.nm_mask(weight_of(70, 68), 1, 4), None),
    ],
    "nm_row_": lambda: [(weights, 2, 4, rows[0], s) for weights, _, rows, s in [_rows()]],
    "pack_mask": lambda: [(torch.rand(3, 40, 3, 3) < 0.5,), (torch.rand(40, 3).t() < 0.5,)],
    "soft_topk_grad": _soft_topk_grad_samples,
    "soft_topk_multi": _soft_topk_samples,
    "sparse_conv2d": lambda: [
        (x.detach(), *_sparse(weight, bits), None, list(weight.shape), [1, 1], [1, 1], [1, 1])
        for x, weight, bits, *_ in list(_conv_samples())[:2]
    ],
    "sparse_linear": lambda: [
        (torch.randn(2, 3, 33), *_sparse(weight_of(7, 33), bits_of(7, 33)), 7, torch.randn(7)),
    ],
    "sparse_pack": lambda: [
        (weight_of(5, 33, grad=False), bits_of(5, 33)),
        (weight_of(4, 600, 3, 3, grad=False), bits_of(4, 600, 3, 3)),
    ],
    "topk_masks": _topk_samples,
    "topk_row_": _topk_row_samples,
    "unified_masks": _unified_samples,
    "unified_rows_": _unified_rows_samples,
    "unpack_mask": lambda: [(bits_of(3, 40, 3, 3), [3, 40, 3, 3]), (bits_of(3, 5), [3, 5])],
}


@pytest.mark.parametrize("op", defined_ops())
def test_opcheck(op):
    assert op in SAMPLES, f"the new op {op} needs a sample in SAMPLES"
    overload = getattr(NAMESPACE, op).default
    for number, arguments in enumerate(SAMPLES[op]()):
        results = torch.library.opcheck(overload, arguments, raise_exception=False)
        wrong = {test: result for test, result in results.items() if result != "SUCCESS"}
        assert not wrong, f"sample {number}: {wrong}"


@pytest.mark.parametrize("op", sorted(SAMPLES))
def test_every_sample_has_its_op(op):
    assert op in defined_ops()


def results_of(op, backend):
    """What a backend returns, or writes in place, for samples that it makes the scratch for."""
    overload, results = getattr(NAMESPACE, op).default, []
    written = [a.alias_info is not None and a.name != "scratch" for a in overload._schema.arguments]
    torch.manual_seed(0)
    with ops.backend(backend), torch.no_grad():
        for arguments in SAMPLES[op]():
            result = overload(*arguments)
            if result is None:
                pairs = zip(arguments, written, strict=True)
                result = [a for a, is_written in pairs if is_written and a is not None]
            results += result if isinstance(result, (list, tuple)) else [result]
    return results


@pytest.mark.parametrize(
    ("op", "backend"),
    [(op, b) for op in SAMPLES for b in ops.implementations(op) if b != "reference"],
)
def test_backends_agree_in_values_and_strides(op, backend, device_of):
    if device_of(backend) != torch.device("cpu"):
        pytest.skip(f"{backend}: does not take the CPU tensors of the samples")
    rounded = ("masked_linear", "masked_conv2d", "sparse_", "nm_linear", "soft_topk")
    tolerance = {} if op.startswith(rounded) else {"rtol": 0, "atol": 0}
    expected = results_of(op, "reference")
    assert expected
    torch.testing.assert_close(results_of(op, backend), expected, check_stride=True, **tolerance)


# ---- choice of backend ---------------------------------------------------------------------------


def test_unknown_backend():
    message = r"backend: name='cudnn'.*reference, cpp, triton, cuda"
    with pytest.raises(ValueError, match=message), ops.backend("cudnn"):
        pass


def test_forced_backend_that_an_op_lacks():
    missing = [b for b in ops.BACKENDS if b not in ops.implementations("mask_and")]
    assert missing, "mask_and has every backend: take another op for this test"
    forced = "cuda" if "cuda" in missing else missing[0]
    a = bits_of(2, 3)
    message = rf"mask_and: backend '{forced}' is forced .* it has reference"
    with ops.backend(forced), pytest.raises(ValueError, match=message):
        ops.mask_and(a, a)
    assert torch.equal(ops.mask_and(a, a), a)  # and the force ends with the block


@pytest.mark.skipif(ops.extension_path is not None, reason="the C++ extension is built here")
def test_cpp_without_the_extension():
    message = r"backend: name='cpp'.*not built.*pip install"
    with pytest.raises(ValueError, match=message), ops.backend("cpp"):
        pass


@pytest.mark.skipif(ops.extension_path is None, reason="the C++ extension is not built")
def test_cpp_is_the_choice_on_the_cpu(monkeypatch):
    from sparse_cocktail.ops import dispatch

    assert "cpp" in ops.implementations("nm_mask")
    table = dispatch._implementations["nm_mask"]
    used = []
    for name in table:
        original = table[name]

        def record(*arguments, name=name, original=original):
            used.append(name)
            return original(*arguments)

        monkeypatch.setitem(table, name, record)
    weight = torch.randn(2, 4)
    ops.nm_mask(weight, 2, 4)
    with ops.backend("reference"):
        with ops.backend("cpp"):
            ops.nm_mask(weight, 2, 4)
        ops.nm_mask(weight, 2, 4)
    assert used == ["cpp", "cpp", "reference"]


def test_force_ends_after_an_error():
    with pytest.raises(ZeroDivisionError), ops.backend("triton"):
        raise ZeroDivisionError
    assert ops.mask_count(bits_of(2, 3)).dtype == torch.int64


# ---- errors --------------------------------------------------------------------------------------

W = torch.zeros(4, 6)
B = ops.pack_mask(torch.ones(4, 6, dtype=torch.bool))
SMALL = torch.zeros(4, 1, 2, dtype=torch.int32)  # bits of a weight with in = 33 to 64
CONV, CONV_BITS = torch.zeros(4, 2, 3, 3), torch.zeros(4, 9, 1, dtype=torch.int32)
X = torch.zeros(1, 2, 5, 5)
INT, HALF, VECTOR = W.int(), W.half(), W[0]

ERRORS = {
    "pack_dtype": (ops.pack_mask, (W,), TypeError, r"pack_mask: mask .*float32.*!= 0"),
    "pack_vector": (ops.pack_mask, (VECTOR > 0,), ValueError, r"pack_mask: mask .*\(6,\)"),
    "unpack_short": (ops.unpack_mask, (B, (4,)), ValueError, r"unpack_mask: shape=\(4,\).*2 dim"),
    "unpack_shape": (ops.unpack_mask, (B, (4, 33)), ValueError, r"\(4, 1, 1\).*\(4, 1, 2\)"),
    "unpack_dtype": (ops.unpack_mask, (B.long(), (4, 6)), TypeError, r"unpack_mask: bits.*int64"),
    "count_dtype": (ops.mask_count, (W,), TypeError, r"mask_count: bits .*float32.*pack_mask"),
    "and_shape": (ops.mask_and, (B, SMALL), ValueError, r"mask_and: .*\(4, 1, 1\).*\(4, 1, 2\)"),
    "or_dtype": (ops.mask_or, (B, B.long()), TypeError, r"mask_or: b has dtype torch.int64"),
    "andnot_dtype": (ops.mask_andnot, (W, B), TypeError, r"mask_andnot: a .*float32"),
    "nm_remainder": (ops.nm_mask, (W, 2, 4), ValueError, r"nm_mask: .*in=6.*m=4; pad"),
    "nm_dense": (ops.nm_mask, (W, 2, 2), ValueError, r"nm_mask: n=2, m=2 .*1 <= n < m <= 32"),
    "nm_zero": (ops.nm_mask, (W, 0, 2), ValueError, r"nm_mask: n=0, m=2"),
    "nm_wide": (ops.nm_mask, (torch.zeros(1, 33), 1, 33), ValueError, r"m=33 breaks"),
    "nm_float": (ops.nm_mask, (W, 1.0, 2), TypeError, r"n=1.0 is a float, but it must be an int"),
    "nm_none": (ops.nm_mask, (None, 1, 2), TypeError, r"weight=None .* must be a torch.Tensor"),
    "unpack_weight": (ops.unpack_mask, (B, W), TypeError, r"shape is a Tensor.*weight.shape"),
    "and_none": (ops.mask_and, (B, None), TypeError, r"b=None .* must be a torch.Tensor"),
    "nm_dtype": (ops.nm_mask, (INT, 1, 2), TypeError, r"nm_mask: weight .*int32.*convert"),
    "nm_vector": (ops.nm_mask, (VECTOR, 1, 2), ValueError, r"nm_mask: weight .*\(6,\)"),
    "topk_many": (ops.topk_masks, ([W], 25), ValueError, r"topk_masks: keep=25 .*\[0, 24\]"),
    "topk_negative": (ops.topk_masks, ([W, W], -1), ValueError, r"keep=-1 .*\[0, 48\]"),
    "topk_second": (ops.topk_masks, ([W, W], [3, 30]), ValueError, r"keep=30 .*\[0, 24\]"),
    "topk_entries": (ops.topk_masks, ([W], [1, 2]), ValueError, r"keep has 2 entries for 1 "),
    "topk_dtypes": (ops.topk_masks, ([W, HALF], 1), ValueError, r"weights\[1\].*float16.*float32"),
    "topk_devices": (ops.topk_masks, ([W, W.to("meta")], 1), ValueError, r"\[1\] .*meta.*cpu"),
    "topk_within": (ops.topk_masks, ([W], 1, [SMALL]), ValueError, r"within\[0\].*\(4, 1, 2\)"),
    "topk_withins": (ops.topk_masks, ([W], 1, []), ValueError, r"within has 0 entries for 1"),
    "topk_share": (ops.topk_masks, ([W], 0.5), TypeError, r"keep=0.5 is not an integer; .*round"),
    "topk_shares": (
        ops.topk_masks,
        ([W, W], [1, None]),
        TypeError,
        r"keep\[1\]=None is not an int",
    ),
    "topk_one": (ops.topk_masks, (W, 1), TypeError, r"weights is a Tensor, .* list; put it into"),
    "topk_none": (ops.topk_masks, ([W, None], 1), TypeError, r"weights\[1\]=None .* torch.Tensor"),
    "topk_array": (ops.topk_masks, ([W.numpy()], 1), TypeError, r"weights\[0\] is a ndarray, but"),
    "topk_one_within": (ops.topk_masks, ([W], 1, B), TypeError, r"within is a Tensor, but .* list"),
    "block_int": (ops.block_masks, ([W], 1, 2), TypeError, r"block=2 is a int, .*\(rows, cols\)"),
    "block_float": (ops.block_masks, ([W], 1, (2.0, 3)), TypeError, r"block\[0\]=2.0 is a float"),
    "block_size": (ops.block_masks, ([W], 1, (0, 3)), ValueError, r"block=\(0, 3\).*positive"),
    "block_rows": (ops.block_masks, ([W], 1, (3, 3)), ValueError, r"\[0\] has out=4.* 3; pad"),
    "block_cols": (ops.block_masks, ([W], 1, (2, 4)), ValueError, r"\[0\] has in=6.* 4; pad"),
    "block_keep": (ops.block_masks, ([W], 5, (2, 3)), ValueError, r"keep=5 .*\[0, 4\].*blocks"),
    "block_within": (ops.block_masks, ([W], 1, (2, 3), [SMALL]), ValueError, r"within\[0\]"),
    "scores_beta": (ops.channel_scores, ([W], [B], [B], 1.5), ValueError, r"beta=1.5 .*\[0, 1\]"),
    "scores_nan": (ops.channel_scores, ([W], [B], [B], float("nan")), ValueError, r"beta=nan"),
    "scores_count": (ops.channel_scores, ([W], [], [B]), ValueError, r"unstructured has 0 .* 1 "),
    "scores_bits": (ops.channel_scores, ([W], [B], [SMALL]), ValueError, r"nm\[0\].*\(4, 1, 2\)"),
    "channel_dtype": (ops.channel_masks, ([W[:, 0]], [1], [(4, 6)]), TypeError, r"\[0\].*float32"),
    "channel_keep": (
        ops.channel_masks,
        ([torch.arange(4)], [5], [(4, 6)]),
        ValueError,
        r"channel_masks: keep\[0\]=5 .*\[0, 4\]",
    ),
    "channel_shape": (
        ops.channel_masks,
        ([torch.arange(4)], [1], [(3, 6)]),
        ValueError,
        r"shapes\[0\]=\(3, 6\).*4 channels",
    ),
    "channel_shapes": (
        ops.channel_masks,
        ([torch.arange(4)], [1], []),
        ValueError,
        r"shapes has 0 entries for 1 ",
    ),
    "channel_int": (
        ops.channel_masks,
        ([torch.arange(4)], 2, [(4, 6)]),
        TypeError,
        r"keep=2 is no list of counts",
    ),
    "unified_share": (
        ops.unified_masks,
        ([W], 0.5, None, [1]),
        TypeError,
        r"keep=0.5 is not an in",
    ),
    "unified_name": (ops.unified_masks, ([W], 1, "1:2", [1]), TypeError, r"nm='1:2' is no pair"),
    "unified_shares": (
        ops.unified_masks,
        ([W], 1, None, [0.5]),
        TypeError,
        r"channel_keep\[0\]=0.5 is not an integer",
    ),
    "unified_keep": (ops.unified_masks, ([W], 25, None, [1]), ValueError, r"keep=25 .*\[0, 24\]"),
    "unified_nm": (ops.unified_masks, ([W], 1, (4, 4), [1]), ValueError, r"nm=\(4, 4\) breaks"),
    "unified_nm_length": (ops.unified_masks, ([W], 1, (2,), [1]), ValueError, r"nm=\(2,\)"),
    "unified_beta": (ops.unified_masks, ([W], 1, None, [1], -0.1), ValueError, r"beta=-0.1"),
    "unified_channels": (ops.unified_masks, ([W], 1, None, [5]), ValueError, r"\[0\]=5 .*\[0, 4\]"),
    "unified_counts": (ops.unified_masks, ([W], 1, None, []), ValueError, r"channel_keep has 0"),
    "unified_both": (
        ops.unified_masks,
        ([W], 1, (1, 2), [1], 0.8, None, [B]),
        ValueError,
        r"unified_masks: both nm=\(1, 2\) and nm_bits",
    ),
    "weight_bits": (ops.masked_weight, (W, SMALL), ValueError, r"\(4, 1, 2\).*\(4, 1, 1\)"),
    "weight_dtype": (ops.masked_weight, (INT, B), TypeError, r"masked_weight: weight .*int32"),
    "weights_count": (ops.masked_weights, ([W], []), ValueError, r"bits has 0 entries for 1"),
    "weights_bits": (ops.masked_weights, ([W], [SMALL]), ValueError, r"bits\[0\].*\(4, 1, 2\)"),
    "weight_bool": (
        ops.masked_weight,
        (W, W > 0),
        TypeError,
        r"bits has dtype torch.bool, .*pack_m",
    ),
    "weight_none": (ops.masked_weight, (W, None), TypeError, r"bits=None .*ops.pack_mask"),
    "weight_to": (
        ops.masked_weight,
        (W, B, torch.int8),
        TypeError,
        r"dtype=torch.int8 is no float",
    ),
    "weights_to": (
        ops.masked_weights,
        ([W], [B], "bf16"),
        TypeError,
        r"dtype='bf16' is no floating",
    ),
    "weights_one": (ops.masked_weights, (W, [B]), TypeError, r"weights is a Tensor, .*list"),
    "linear_none": (
        ops.masked_linear,
        (None, W, B),
        TypeError,
        r"x=None .* must be a torch.Tensor",
    ),
    "linear_device": (
        ops.masked_linear,
        (W.to("meta"), W, B),
        ValueError,
        r"x is on meta, but its weight is on cpu; move",
    ),
    "linear_bool": (ops.masked_linear, (W, W, B, True), TypeError, r"bias=True is a bool, but"),
    "conv_list": (ops.masked_conv2d, ([X], CONV, CONV_BITS), TypeError, r"x is a list, but"),
    "conv_stride": (
        ops.masked_conv2d,
        (X, CONV, CONV_BITS, None, 1.5),
        ValueError,
        r"stride=1.5 is neither an int nor a pair",
    ),
    "workspace_one": (ops.workspace, (CONV,), TypeError, r"weights is a Tensor, .* list"),
    "linear_x": (ops.masked_linear, (X, W, B), ValueError, r"\(1, 2, 5, 5\).*\(4, 6\)"),
    "linear_int": (ops.masked_linear, (INT, W, B), TypeError, r"masked_linear: x .*int32"),
    "linear_bias": (ops.masked_linear, (W, W, B, VECTOR), ValueError, r"bias .*\(6,\).* 4 outputs"),
    "linear_bits": (
        ops.masked_linear,
        (W, W, SMALL),
        ValueError,
        r"masked_linear: bits.*\(4, 1, 2",
    ),
    "conv_groups": (
        ops.masked_conv2d,
        (X, CONV, CONV_BITS, None, 1, 0, 1, 2),
        ValueError,
        r"masked_conv2d: x .*\(1, 2, 5, 5\).*groups=2",
    ),
    "conv_weight": (ops.masked_conv2d, (X, W, B), ValueError, r"weight \(4, 6\).*kh, kw"),
    "conv_bits": (ops.masked_conv2d, (X, CONV, B), ValueError, r"\(4, 1, 1\).*\(4, 9, 1\)"),
    "conv_padding": (
        ops.masked_conv2d,
        (X, CONV, CONV_BITS, None, 1, "same"),
        (ValueError, TypeError),
        r"masked_conv2d: padding='same'",
    ),
}


def test_counts_of_numpy_and_tensors_are_ints():
    expected = ops.topk_masks([W, W], [3, 4])
    for keep in (np.array([3, 4]), [np.int64(3), torch.tensor(4)], (3, 4)):
        assert all(map(torch.equal, ops.topk_masks((W, W), keep), expected))
    assert torch.equal(ops.nm_mask(W, np.int64(1), torch.tensor(2)), ops.nm_mask(W, 1, 2))


@pytest.mark.parametrize(("op", "arguments", "error", "match"), ERRORS.values(), ids=ERRORS)
def test_error_names_op_value_and_rule(op, arguments, error, match):
    with pytest.raises(error, match=match) as caught:
        op(*arguments)
    assert str(caught.value).startswith(f"{op.__name__}: ")


@pytest.mark.skipif(not ops.cpu_levels(), reason="needs the C++ extension")
def test_the_environment_lowers_the_level():
    show = "from sparse_cocktail import ops; print(ops.cpu_level(), *ops.cpu_levels())"

    def shown(level):
        env = {**os.environ, "SPARSE_COCKTAIL_CPU_LEVEL": level}
        program = [sys.executable, "-c", show]
        return subprocess.run(program, env=env, capture_output=True, text=True)

    assert shown("portable").stdout.split() == ["portable", "portable"]
    assert shown("").stdout.split() == [ops.cpu_levels()[-1], *ops.cpu_levels()]
    assert "SPARSE_COCKTAIL_CPU_LEVEL='avx3' is unknown; set it to one of portable, avx2" in (
        shown("avx3").stderr
    )
