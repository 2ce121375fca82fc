"""Masked conv2d as implicit matrix products: tiles of shifted pixels are read where they lie.

    conv_forward      y^T (out, pixels)  = W*m (out, taps in)       x^T (taps in, pixels)    + b
    conv_input_grad   gx^T (in, pixels)  = (W*m)^T (in, taps out)   g^T (taps out, pixels)
    conv_weight_grad  gW (out, in)       = g^T (out, pixels)        x (pixels, in)    for each tap
    direct_*          the same without tensor cores, for groups of a few channels (depthwise)

x, g and y are (batch, height, width, channels) in memory order. The weight is (out, taps, in) with
any strides, bits are int32 words (out, taps, ceil(in / 32)). `outputs` and `inputs` count the
channels of one group, axis 2 of the grid. Axis 1 are parts of K, as in masked_linear.py, or the
phases of conv_input_grad. `step` is the stride of the convolution, `dilate` its dilation.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .masked_tiles import cast, kept, steps_of, tile_of


@triton.jit
def pixel_of(o_pixel, height, width):
    """Pixel number -> (image, row, column)."""
    o_line = o_pixel // width
    image = o_line // height
    return image, o_line - image * height, o_pixel - o_line * width


@triton.jit
def inside(o_h, o_w, height, width):
    """Whether a pixel lies on the picture and not in its padding."""
    return (o_h >= 0) & (o_h < height) & (o_w >= 0) & (o_w < width)


# x (batch, height, width, in), weight, words  -->  y (batch, out_height, out_width, out)
@triton.jit
def conv_forward(
    p_x, p_weight, p_bits, p_bias, p_y, batch, height, width, out_height, out_width, outputs,
    inputs, groups, kernel_h, kernel_w, step_h, step_w, pad_h, pad_w, dilate_h, dilate_w,
    stride_out, stride_tap, stride_in, part, BIAS: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    TYPE: tl.constexpr = p_x.dtype.element_ty
    i_group = tl.program_id(2).to(tl.int64)
    pixels = batch * out_height * out_width
    tiles_m, tiles_n = tl.cdiv(outputs, BLOCK_M), tl.cdiv(pixels, BLOCK_N)
    i_m, i_n = tile_of(tl.program_id(0), tiles_m, tiles_n, GROUP)
    o_out = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_pixel = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # Beyond the last output or pixel the first one is read, and nothing stored.
    o_read = tl.where(o_out < outputs, o_out, 0) + i_group * outputs
    words = tl.cdiv(inputs, 32)
    p_bits += o_read * (kernel_h * kernel_w * words)
    p_weight += (o_read * stride_out)[:, None]
    image, o_h, o_w = pixel_of(tl.where(o_pixel < pixels, o_pixel, 0), out_height, out_width)
    o_h, o_w = o_h * step_h - pad_h, o_w * step_w - pad_w
    o_x = ((image.to(tl.int64) * height + o_h) * width + o_w) * (inputs * groups)
    p_x += (o_x + i_group * inputs)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    per_tap = tl.cdiv(inputs, BLOCK_K)
    first, last = steps_of(kernel_h * kernel_w * per_tap)
    # Counters instead of a division at each step: first input, column and row of the tap.
    tap = first // per_tap
    i_in = (first - tap * per_tap) * BLOCK_K
    tap_h = tap // kernel_w
    tap_w = tap - tap_h * kernel_w
    for _ in range(first, last):
        i_in = tl.multiple_of(i_in, BLOCK_K)
        o_in = i_in + tl.arange(0, BLOCK_K)
        m_in = (o_in < inputs) | EVEN
        i_tap = tap_h * kernel_w + tap_w
        m_kept = kept(p_bits + i_tap * words, o_out < outputs, i_in, words, BLOCK_M, BLOCK_K)
        o_weight = i_tap * stride_tap + o_in * stride_in
        b_weight = tl.load(p_weight + o_weight[None, :], mask=m_in[None, :], other=0.0)
        shift_h, shift_w = tap_h * dilate_h, tap_w * dilate_w
        m_x = inside(o_h + shift_h, o_w + shift_w, height, width)[None, :] & m_in[:, None]
        o_shift = (shift_h * width + shift_w) * (inputs * groups) + o_in
        b_x = tl.load(p_x + o_shift[:, None], mask=m_x, other=0.0)
        b_weight = cast(tl.where(m_kept, b_weight, 0.0), TYPE)
        acc = tl.dot(b_weight, cast(b_x, TYPE), acc, input_precision=PRECISION)
        i_in += BLOCK_K
        tap_w += (i_in >= inputs).to(tl.int32)
        i_in = tl.where(i_in >= inputs, 0, i_in)
        tap_h += (tap_w >= kernel_w).to(tl.int32)
        tap_w = tl.where(tap_w >= kernel_w, 0, tap_w)
    if BIAS:
        acc += tl.load(p_bias + o_read).to(tl.float32)[:, None]
    p_y += tl.program_id(1).to(tl.int64) * part + i_group * outputs
    p_y += (o_pixel.to(tl.int64) * (outputs * groups))[None, :] + o_out[:, None]
    m_y = (o_out < outputs)[:, None] & (o_pixel < pixels)[None, :]
    tl.store(p_y, cast(acc, p_y.dtype.element_ty), mask=m_y)


# With a stride, an input pixel meets only some of the taps: those for which
# row + pad - tap * dilate is a multiple of the step. They are the same for all pixels of one phase,
# row % step, and lie `period` = step / gcd(step, dilate) taps apart, `jump` = period * dilate /
# step rows of g. Each program works on pixels of one phase and walks over its taps alone.
@triton.jit
def taps_of(phase, kernel, step, pad, dilate, period):
    """First tap of a phase, number of its taps, and row of g that it meets at the phase's row 0."""
    tap = kernel  # none
    for i in range(period):
        tap = tl.where((phase + pad - i * dilate) % step == 0, i, tap)
    return tap, (kernel - tap + period - 1) // period, (phase + pad - tap * dilate) // step


# grad (batch, out_height, out_width, out), weight, words  -->  result (batch, height, width, in)
@triton.jit
def conv_input_grad(
    p_grad, p_weight, p_bits, p_result, batch, height, width, out_height, out_width, outputs,
    inputs, groups, kernel_h, kernel_w, step_h, step_w, pad_h, pad_w, dilate_h, dilate_w,
    period_h, period_w, jump_h, jump_w, stride_out, stride_tap, stride_in, EVEN: tl.constexpr,
    PRECISION: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    TYPE: tl.constexpr = p_grad.dtype.element_ty
    i_group = tl.program_id(2).to(tl.int64)
    phase_h, phase_w = tl.program_id(1) // step_w, tl.program_id(1) % step_w
    lines, columns = tl.cdiv(height - phase_h, step_h), tl.cdiv(width - phase_w, step_w)
    pixels = batch * lines * columns  # 0 where the picture is smaller than the step
    # the grid is made for phase 0, which has the most pixels
    most = batch * tl.cdiv(height, step_h) * tl.cdiv(width, step_w)
    i_m, i_n = tile_of(
        tl.program_id(0), tl.cdiv(inputs, BLOCK_M), tl.cdiv(most, BLOCK_N), GROUP
    )  # fmt: skip
    o_in = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_pixel = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_pixel = o_pixel < pixels
    o_pixel = tl.where(m_pixel, o_pixel, 0)
    image, o_h, o_w = pixel_of(o_pixel, tl.maximum(lines, 1), tl.maximum(columns, 1))
    image = image.to(tl.int64)
    o_result = ((image * height + phase_h + o_h * step_h) * width + phase_w + o_w * step_w) * (
        inputs * groups
    )  # fmt: skip
    first_h, taps_h, meets_h = taps_of(phase_h, kernel_h, step_h, pad_h, dilate_h, period_h)
    first_w, taps_w, meets_w = taps_of(phase_w, kernel_w, step_w, pad_w, dilate_w, period_w)
    o_h, o_w = o_h + meets_h, o_w + meets_w
    o_grad = ((image * out_height + o_h) * out_width + o_w) * (outputs * groups)
    p_grad += (o_grad + i_group * outputs)[None, :]
    words = tl.cdiv(inputs, 32)
    p_weight += (o_in.to(tl.int64) * stride_in)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    i_out, tap_h, tap_w = 0, 0, 0
    for _ in range(0, taps_h * taps_w * tl.cdiv(outputs, BLOCK_K)):
        i_out = tl.multiple_of(i_out, BLOCK_K)
        o_out = i_out + tl.arange(0, BLOCK_K)
        m_out = (o_out < outputs) | EVEN
        i_tap = (first_h + tap_h * period_h) * kernel_w + first_w + tap_w * period_w
        o_read = tl.where(m_out, o_out, 0) + i_group * outputs
        p_row = p_bits + (o_read * (kernel_h * kernel_w) + i_tap) * words
        m_kept = kept(p_row, m_out, i_m * BLOCK_M, words, BLOCK_K, BLOCK_M)
        o_weight = (o_read * stride_out + i_tap * stride_tap)[:, None]
        m_weight = m_out[:, None] & (o_in < inputs)[None, :]
        b_weight = tl.load(p_weight + o_weight, mask=m_weight, other=0.0)
        shift_h, shift_w = tap_h * jump_h, tap_w * jump_w
        m_grad = inside(o_h - shift_h, o_w - shift_w, out_height, out_width)
        o_shift = o_out - (shift_h * out_width + shift_w) * (outputs * groups)
        m_grad = m_grad[None, :] & m_out[:, None]
        b_grad = tl.load(p_grad + o_shift[:, None], mask=m_grad, other=0.0)
        b_weight = tl.trans(cast(tl.where(m_kept, b_weight, 0.0), TYPE))
        acc = tl.dot(b_weight, cast(b_grad, TYPE), acc, input_precision=PRECISION)
        i_out += BLOCK_K
        tap_w += (i_out >= outputs).to(tl.int32)
        i_out = tl.where(i_out >= outputs, 0, i_out)
        tap_h += (tap_w >= taps_w).to(tl.int32)
        tap_w = tl.where(tap_w >= taps_w, 0, tap_w)
    p_result += (o_result + i_group * inputs)[None, :] + o_in[:, None]
    m_result = (o_in < inputs)[:, None] & m_pixel[None, :]
    tl.store(p_result, cast(acc, p_result.dtype.element_ty), mask=m_result)


# grad, x, words  -->  result (out, taps, in), any strides; tiles of all taps follow each other
@triton.jit
def conv_weight_grad(
    p_grad, p_x, p_bits, p_result, batch, height, width, out_height, out_width, outputs, inputs,
    groups, kernel_h, kernel_w, step_h, step_w, pad_h, pad_w, dilate_h, dilate_w, stride_out,
    stride_tap, stride_in, part, MASKED: tl.constexpr, PRECISION: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    TYPE: tl.constexpr = p_x.dtype.element_ty
    i_group = tl.program_id(2).to(tl.int64)
    taps = kernel_h * kernel_w
    i_tap = tl.program_id(0) % taps
    i_m, i_n = tile_of(
        tl.program_id(0) // taps, tl.cdiv(outputs, BLOCK_M), tl.cdiv(inputs, BLOCK_N), GROUP
    )
    o_out = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_in = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_out, m_in = o_out < outputs, o_in < inputs
    p_grad += (i_group * outputs + o_out)[None, :]
    p_x += (i_group * inputs + o_in)[None, :]
    shift_h = i_tap // kernel_w * dilate_h - pad_h
    shift_w = i_tap % kernel_w * dilate_w - pad_w
    pixels = batch * out_height * out_width
    first, last = steps_of(tl.cdiv(pixels, BLOCK_K))
    # Counters again: image, row and column of each pixel, and what BLOCK_K pixels add to them.
    o_pixel = first * BLOCK_K + tl.arange(0, BLOCK_K)
    image, o_h, o_w = pixel_of(o_pixel, out_height, out_width)
    add_image, add_h, add_w = pixel_of(BLOCK_K, out_height, out_width)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(first, last):
        o_pixel = step * BLOCK_K + tl.arange(0, BLOCK_K)
        m_pixel = o_pixel < pixels
        o_grad = o_pixel.to(tl.int64)[:, None] * (outputs * groups)
        m_grad = m_pixel[:, None] & m_out[None, :]
        b_grad = tl.load(p_grad + o_grad, mask=m_grad, other=0.0)
        x_h, x_w = o_h * step_h + shift_h, o_w * step_w + shift_w
        o_x = ((image.to(tl.int64) * height + x_h) * width + x_w) * (inputs * groups)
        m_x = (m_pixel & inside(x_h, x_w, height, width))[:, None] & m_in[None, :]
        b_x = tl.load(p_x + o_x[:, None], mask=m_x, other=0.0)
        b_grad = tl.trans(cast(b_grad, TYPE))
        acc = tl.dot(b_grad, cast(b_x, TYPE), acc, input_precision=PRECISION)
        o_w += add_w
        o_h += add_h + (o_w >= out_width).to(tl.int32)
        o_w = tl.where(o_w >= out_width, o_w - out_width, o_w)
        image += add_image + (o_h >= out_height).to(tl.int32)
        o_h = tl.where(o_h >= out_height, o_h - out_height, o_h)
    o_row = tl.where(m_out, o_out, 0) + i_group * outputs
    if MASKED:
        words = tl.cdiv(inputs, 32)
        p_row = p_bits + (o_row * taps + i_tap) * words
        acc = tl.where(kept(p_row, m_out, i_n * BLOCK_N, words, BLOCK_M, BLOCK_N), acc, 0.0)
    p_result += tl.program_id(1).to(tl.int64) * part + (o_row * stride_out)[:, None]
    p_result += (o_in.to(tl.int64) * stride_in + i_tap * stride_tap)[None, :]
    m_result = m_out[:, None] & m_in[None, :]
    tl.store(p_result, cast(acc, p_result.dtype.element_ty), mask=m_result)


# ---- groups of a few channels --------------------------------------------------------------------
# One multiply-add per thread, channel and tap. Neighbouring threads take neighbouring channels, so
# that depthwise layers, which wait for memory anyway, read and write whole lines.


@triton.jit
def direct_weight(p_weight, p_bits, o_row, i_in, words, stride_in, TYPE: tl.constexpr, m_row):
    """Masked weights (channels,) at input i_in, as fp32 numbers rounded to TYPE."""
    word = tl.load(p_bits + o_row * words + i_in // 32, mask=m_row, other=0)
    m_kept = ((word >> (i_in % 32)) & 1) != 0
    weight = tl.load(p_weight + i_in * stride_in, mask=m_row, other=0.0)
    return cast(tl.where(m_kept, weight, 0.0), TYPE).to(tl.float32)


# as conv_forward; o_out counts the outputs of all groups
@triton.jit
def direct_forward(
    p_x, p_weight, p_bits, p_bias, p_y, batch, height, width, out_height, out_width, outputs,
    inputs, groups, kernel_h, kernel_w, step_h, step_w, pad_h, pad_w, dilate_h, dilate_w,
    stride_out, stride_tap, stride_in, BIAS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    TYPE: tl.constexpr = p_x.dtype.element_ty
    o_out = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_pixel = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_out, m_pixel = o_out < outputs * groups, o_pixel < batch * out_height * out_width
    image, o_h, o_w = pixel_of(o_pixel, out_height, out_width)
    o_h, o_w = o_h * step_h - pad_h, o_w * step_w - pad_w
    o_x = ((image.to(tl.int64) * height + o_h) * width + o_w) * (inputs * groups)
    p_x += o_x[:, None] + (o_out // outputs * inputs)[None, :]
    o_row, words = o_out.to(tl.int64), tl.cdiv(inputs, 32)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for i_tap in range(kernel_h * kernel_w):
        shift_h, shift_w = i_tap // kernel_w * dilate_h, i_tap % kernel_w * dilate_w
        m_x = m_pixel & inside(o_h + shift_h, o_w + shift_w, height, width)
        m_x = m_x[:, None] & m_out[None, :]
        p_tap = p_weight + o_row * stride_out + i_tap * stride_tap
        o_tap = o_row * (kernel_h * kernel_w) + i_tap
        for i_in in range(inputs):
            weight = direct_weight(p_tap, p_bits, o_tap, i_in, words, stride_in, TYPE, m_out)
            o_shift = (shift_h * width + shift_w) * (inputs * groups) + i_in
            acc += tl.load(p_x + o_shift, mask=m_x, other=0.0).to(tl.float32) * weight[None, :]
    if BIAS:
        acc += tl.load(p_bias + o_out, mask=m_out, other=0.0).to(tl.float32)[None, :]
    p_y += (o_pixel.to(tl.int64) * (outputs * groups))[:, None] + o_out[None, :]
    tl.store(p_y, cast(acc, p_y.dtype.element_ty), mask=m_pixel[:, None] & m_out[None, :])


# as conv_input_grad, without phases; o_in counts the inputs of all groups
@triton.jit
def direct_input_grad(
    p_grad, p_weight, p_bits, p_result, batch, height, width, out_height, out_width, outputs,
    inputs, groups, kernel_h, kernel_w, step_h, step_w, pad_h, pad_w, dilate_h, dilate_w,
    stride_out, stride_tap, stride_in, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    TYPE: tl.constexpr = p_grad.dtype.element_ty
    o_in = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_pixel = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_in, m_pixel = o_in < inputs * groups, o_pixel < batch * height * width
    image, o_h, o_w = pixel_of(o_pixel, height, width)
    o_group, words = o_in // inputs, tl.cdiv(inputs, 32)
    i_in = o_in - o_group * inputs
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for i_tap in range(kernel_h * kernel_w):
        g_h = o_h + pad_h - i_tap // kernel_w * dilate_h
        g_w = o_w + pad_w - i_tap % kernel_w * dilate_w
        meets = (g_h % step_h == 0) & (g_w % step_w == 0)
        g_h, g_w = g_h // step_h, g_w // step_w
        m_grad = m_pixel & meets & inside(g_h, g_w, out_height, out_width)
        m_grad = m_grad[:, None] & m_in[None, :]
        o_grad = ((image.to(tl.int64) * out_height + g_h) * out_width + g_w) * (outputs * groups)
        for i_out in range(outputs):
            o_out = o_group.to(tl.int64) * outputs + i_out
            p_tap = p_weight + o_out * stride_out + i_tap * stride_tap
            o_tap = o_out * (kernel_h * kernel_w) + i_tap
            weight = direct_weight(p_tap, p_bits, o_tap, i_in, words, stride_in, TYPE, m_in)
            p_g = p_grad + o_grad[:, None] + o_out[None, :]
            acc += tl.load(p_g, mask=m_grad, other=0.0).to(tl.float32) * weight[None, :]
    p_result += (o_pixel.to(tl.int64) * (inputs * groups))[:, None] + o_in[None, :]
    m_result = m_pixel[:, None] & m_in[None, :]
    tl.store(p_result, cast(acc, p_result.dtype.element_ty), mask=m_result)


# as conv_weight_grad; axis 0 of the grid are outputs, axis 2 are tap * inputs + input
@triton.jit
def direct_weight_grad(
    p_grad, p_x, p_bits, p_result, batch, height, width, out_height, out_width, outputs, inputs,
    groups, kernel_h, kernel_w, step_h, step_w, pad_h, pad_w, dilate_h, dilate_w, stride_out,
    stride_tap, stride_in, part, MASKED: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    o_out = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_out = o_out < outputs * groups
    i_tap = tl.program_id(2) // inputs
    i_in = tl.program_id(2) - i_tap * inputs
    shift_h = i_tap // kernel_w * dilate_h - pad_h
    shift_w = i_tap % kernel_w * dilate_w - pad_w
    pixels = batch * out_height * out_width
    p_x += o_out // outputs * inputs + i_in
    acc = tl.zeros((BLOCK_M,), tl.float32)
    first, last = steps_of(tl.cdiv(pixels, BLOCK_N))
    for step in range(first, last):
        o_pixel = step * BLOCK_N + tl.arange(0, BLOCK_N)
        image, o_h, o_w = pixel_of(o_pixel, out_height, out_width)
        o_h, o_w = o_h * step_h + shift_h, o_w * step_w + shift_w
        m_pixel = (o_pixel < pixels) & inside(o_h, o_w, height, width)
        m_both = m_pixel[:, None] & m_out[None, :]
        o_x = ((image.to(tl.int64) * height + o_h) * width + o_w) * (inputs * groups)
        o_grad = o_pixel.to(tl.int64) * (outputs * groups)
        b_x = tl.load(p_x[None, :] + o_x[:, None], mask=m_both, other=0.0).to(tl.float32)
        p_g = p_grad + o_grad[:, None] + o_out[None, :]
        acc += tl.sum(tl.load(p_g, mask=m_both, other=0.0).to(tl.float32) * b_x, axis=0)
    o_row = o_out.to(tl.int64)
    if MASKED:
        o_word = (o_row * (kernel_h * kernel_w) + i_tap) * tl.cdiv(inputs, 32) + i_in // 32
        word = tl.load(p_bits + o_word, mask=m_out, other=0)
        acc = tl.where(((word >> (i_in % 32)) & 1) != 0, acc, 0.0)
    o_result = o_row * stride_out + i_tap * stride_tap + i_in * stride_in
    p_result += tl.program_id(1).to(tl.int64) * part
    tl.store(p_result + o_result, cast(acc, p_result.dtype.element_ty), mask=m_out)
