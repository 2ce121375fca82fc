"""Masked linear layer: y = x (W*m)^T + b and its gradients. Pointwise convolutions run here, too.

    linear_forward      y^T (out, rows)  = W*m (out, in)     x^T (in, rows)     + b
    linear_input_grad   gx^T (in, rows)  = (W*m)^T (in, out) g^T (out, rows)
    linear_weight_grad  gW (out, in)     = g^T (out, rows)   x (rows, in)       masked, or dense
    sum_parts           y, gx or gW from the sums of parts of K that several programs made

x, g and y are row-major, with contiguous rows. The weight has any strides; bits are int32 words
(out, ceil(in / 32)). Results are written in the element type of their pointer: that of the layer,
or fp32 for parts. Axis 0 of the grid numbers tiles, axis 1 the parts of K; `part` is the number
of elements of one part.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .masked_tiles import cast, kept, steps_of, tile_of


# x (rows, in), weight (out, in), words (out, in / 32)  -->  y (rows, out)
@triton.jit
def linear_forward(
    p_x, p_weight, p_bits, p_bias, p_y, rows, outputs, inputs, stride_x, stride_out, stride_in,
    part, BIAS: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    TYPE: tl.constexpr = p_x.dtype.element_ty
    tiles_m, tiles_n = tl.cdiv(outputs, BLOCK_M), tl.cdiv(rows, BLOCK_N)
    i_m, i_n = tile_of(tl.program_id(0), tiles_m, tiles_n, GROUP)
    o_out = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_row = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # Beyond the last output or row the first one is read, so that loads need no mask in M and N.
    o_read = tl.where(o_out < outputs, o_out, 0).to(tl.int64)
    words = tl.cdiv(inputs, 32)
    p_bits += o_read * words
    p_weight += (o_read * stride_out)[:, None]
    p_x += (tl.where(o_row < rows, o_row, 0).to(tl.int64) * stride_x)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    first, last = steps_of(tl.cdiv(inputs, BLOCK_K))
    for step in range(first, last):
        o_in = step * BLOCK_K + tl.arange(0, BLOCK_K)
        m_in = (o_in < inputs) | EVEN
        m_kept = kept(p_bits, o_out < outputs, step * BLOCK_K, words, BLOCK_M, BLOCK_K)
        b_weight = tl.load(p_weight + (o_in * stride_in)[None, :], mask=m_in[None, :], other=0.0)
        b_x = tl.load(p_x + o_in[:, None], mask=m_in[:, None], other=0.0)
        b_weight = cast(tl.where(m_kept, b_weight, 0.0), TYPE)
        acc = tl.dot(b_weight, cast(b_x, TYPE), acc, input_precision=PRECISION)
    if BIAS:
        acc += tl.load(p_bias + o_read).to(tl.float32)[:, None]
    p_y += tl.program_id(1).to(tl.int64) * part
    p_y += (o_row.to(tl.int64) * outputs)[None, :] + o_out[:, None]
    m_y = (o_out < outputs)[:, None] & (o_row < rows)[None, :]
    tl.store(p_y, cast(acc, p_y.dtype.element_ty), mask=m_y)


# grad (rows, out), weight (out, in), words (out, in / 32)  -->  result (rows, in)
# The weight's tile is loaded and masked as it lies in memory, (out, in), and transposed on its way
# into the registers of A.
@triton.jit
def linear_input_grad(
    p_grad, p_weight, p_bits, p_result, rows, outputs, inputs, stride_grad, stride_out, stride_in,
    part, EVEN: tl.constexpr, PRECISION: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    TYPE: tl.constexpr = p_grad.dtype.element_ty
    tiles_m, tiles_n = tl.cdiv(inputs, BLOCK_M), tl.cdiv(rows, BLOCK_N)
    i_m, i_n = tile_of(tl.program_id(0), tiles_m, tiles_n, GROUP)
    o_in = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_row = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    words = tl.cdiv(inputs, 32)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    first, last = steps_of(tl.cdiv(outputs, BLOCK_K))
    o_out = first * BLOCK_K + tl.arange(0, BLOCK_K)
    p_bits += o_out.to(tl.int64) * words
    p_weight += (o_out.to(tl.int64) * stride_out)[:, None] + (o_in.to(tl.int64) * stride_in)[
        None, :
    ]
    p_grad += (tl.where(o_row < rows, o_row, 0).to(tl.int64) * stride_grad)[None, :]
    stride_step = tl.full((), BLOCK_K, tl.int64) * stride_out
    for step in range(first, last):
        o_out = step * BLOCK_K + tl.arange(0, BLOCK_K)
        m_out = (o_out < outputs) | EVEN
        m_kept = kept(p_bits, m_out, i_m * BLOCK_M, words, BLOCK_K, BLOCK_M)
        m_weight = m_out[:, None] & (o_in < inputs)[None, :]
        b_weight = tl.load(p_weight, mask=m_weight, other=0.0)
        b_grad = tl.load(p_grad + o_out[:, None], mask=m_out[:, None], other=0.0)
        b_weight = tl.trans(cast(tl.where(m_kept, b_weight, 0.0), TYPE))
        acc = tl.dot(b_weight, cast(b_grad, TYPE), acc, input_precision=PRECISION)
        p_bits += BLOCK_K * words
        p_weight += stride_step
    p_result += tl.program_id(1).to(tl.int64) * part
    p_result += (o_row.to(tl.int64) * inputs)[None, :] + o_in[:, None]
    m_result = (o_in < inputs)[:, None] & (o_row < rows)[None, :]
    tl.store(p_result, cast(acc, p_result.dtype.element_ty), mask=m_result)


# grad (rows, out), x (rows, in), words (out, in / 32)  -->  result (out, in), any strides
@triton.jit
def linear_weight_grad(
    p_grad, p_x, p_bits, p_result, rows, outputs, inputs, stride_grad, stride_x, stride_out,
    stride_in, part, MASKED: tl.constexpr, PRECISION: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    TYPE: tl.constexpr = p_x.dtype.element_ty
    tiles_m, tiles_n = tl.cdiv(outputs, BLOCK_M), tl.cdiv(inputs, BLOCK_N)
    i_m, i_n = tile_of(tl.program_id(0), tiles_m, tiles_n, GROUP)
    o_out = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_in = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_out, m_in = o_out < outputs, o_in < inputs
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    first, last = steps_of(tl.cdiv(rows, BLOCK_K))
    for step in range(first, last):
        o_row = step * BLOCK_K + tl.arange(0, BLOCK_K)
        m_row = (o_row < rows)[:, None]
        o_row = o_row.to(tl.int64)[:, None]
        p_g, p_b = p_grad + o_row * stride_grad, p_x + o_row * stride_x
        b_grad = tl.load(p_g + o_out[None, :], mask=m_row & m_out[None, :], other=0.0)
        b_x = tl.load(p_b + o_in[None, :], mask=m_row & m_in[None, :], other=0.0)
        b_grad = tl.trans(cast(b_grad, TYPE))
        acc = tl.dot(b_grad, cast(b_x, TYPE), acc, input_precision=PRECISION)
    if MASKED:
        words = tl.cdiv(inputs, 32)
        p_row = p_bits + o_out.to(tl.int64) * words
        acc = tl.where(kept(p_row, m_out, i_n * BLOCK_N, words, BLOCK_M, BLOCK_N), acc, 0.0)
    p_result += tl.program_id(1).to(tl.int64) * part + (o_out.to(tl.int64) * stride_out)[:, None]
    p_result += (o_in.to(tl.int64) * stride_in)[None, :]
    m_result = m_out[:, None] & m_in[None, :]
    tl.store(p_result, cast(acc, p_result.dtype.element_ty), mask=m_result)


# parts (parts, rows, taps, columns) fp32  -->  result (rows, taps, columns), any strides
# The parts are added one after the other, so that equal inputs give equal bits. Rows, taps and
# columns are rows, 1 and out for y; rows, 1 and in for gx; out, taps and in for gW.
@triton.jit
def sum_parts(
    p_parts, p_bits, p_bias, p_result, parts, part, taps, columns, stride_row, stride_tap,
    stride_column, BIAS: tl.constexpr, MASKED: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    o_element = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    on = o_element < part
    o_view = o_element // columns  # row * taps + tap
    o_column = (o_element - o_view * columns).to(tl.int32)
    total = tl.zeros((SIZE,), tl.float32)
    p_parts += o_element
    for _ in range(parts):
        total += tl.load(p_parts, mask=on, other=0.0)
        p_parts += part
    if BIAS:
        total += tl.load(p_bias + o_column, mask=on, other=0.0).to(tl.float32)
    if MASKED:
        o_word = o_view * tl.cdiv(columns, 32) + o_column // 32
        word = tl.load(p_bits + o_word, mask=on, other=0)
        total = tl.where(((word >> (o_column % 32)) & 1) != 0, total, 0.0)
    o_row = o_view // taps
    p_result += o_row * stride_row + (o_view - o_row * taps) * stride_tap
    p_result += o_column.to(tl.int64) * stride_column
    tl.store(p_result, cast(total, p_result.dtype.element_ty), mask=on)
