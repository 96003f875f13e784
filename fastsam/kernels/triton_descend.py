"""The second pass in Triton: the weights restored, and the base optimizer's update, in one kernel each."""

from __future__ import annotations

import triton
import triton.language as tl

from fastsam.kernels import device
from fastsam.kernels.triton_access import (
    TAIL,
    all_finite,
    columns,
    copy,
    find_chunk,
    first_number,
    full_blocks,
    in_reverse,
    is_last,
    load,
    load_gradient,
    part,
    store,
)  # fmt: skip

_, _GRADIENT, *_, _PARAM, _, _, _, _ROW = columns(device.ROW)
_SGD_LR, _MOMENTUM, _DAMPENING, _SGD_DECAY, _NESTEROV, _SGD_MAXIMIZE, _SGD = columns(device.SGD)
_LR, _BETA1, _BETA2, _LOG2_BETA1, _LOG2_BETA2, _EPS, _DECAY, _DECOUPLED, _MAXIMIZE, _ADAM = columns(device.ADAM)
_OF_GRADIENT, _OF_STORED, _DIRECT_GRADIENT, _DIRECT_STORED, _KEEP_GRADIENT, _KEEP_STORED, _MIXTURE = columns(
    device.MIXTURE
)
_GRAD_SCALE, _MAX_NORM, _CLIP_VALUE, _ = columns(device.SCALING)
_FIRST_KEY, _SECOND_KEY, _ = columns(device.ROUNDING)


# ---- descend: restore and the base optimizer's update in one pass -------------------------------------------


@triton.jit(do_not_specialize=["n_rows"])
def descend_sgd(
    rows, chunks, n_rows, hyper, scaling, sums, backup, ema, ema_next, mixture, stored, stored_next,
    rounding, momentum_buffer,
    W: tl.constexpr, G: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    w, g, offset, group, _, climbed, kind, count = find_chunk(rows, chunks, in_reverse(), W)
    source = tl.where(climbed, part(backup, offset), w)
    buffer = part(momentum_buffer, offset)
    s, s_next = part(stored, offset), part(stored_next, offset)
    if not all_finite(sums):
        abandon(w, source, ema, ema_next, offset, count, W, M)
    elif g == 0:
        copy(w, source, 0, count, W, TAIL, False)
    else:
        line = hyper + _SGD * group
        scale, limit = _scale_and_limit(scaling, sums)
        of_g, of_s, direct_g, direct_s, keep_g, keep_s = _mixture(mixture, group, W)
        full = full_blocks(count, w | source | g | buffer | s | s_next, BLOCK)
        _sgd_range(
            0, full, w, source, g, buffer, s, s_next, line, scale, limit, kind,
            of_g, of_s, direct_g, direct_s, keep_g, keep_s, rounding, rows, chunks,
            momentum_buffer is not None, mixture is not None, stored is not None, stored_next is not None,
            W, G, M, BLOCK, True,
        )  # fmt: skip
        _sgd_range(
            full, count, w, source, g, buffer, s, s_next, line, scale, limit, kind,
            of_g, of_s, direct_g, direct_s, keep_g, keep_s, rounding, rows, chunks,
            momentum_buffer is not None, mixture is not None, stored is not None, stored_next is not None,
            W, G, M, TAIL, False,
        )  # fmt: skip


@triton.jit
def _sgd_range(
    begin, end, w, source, g, buffer, s, s_next, line, scale, limit, kind,
    of_g, of_s, direct_g, direct_s, keep_g, keep_s, rounding, rows, chunks,
    MOMENTUM: tl.constexpr, MIXES: tl.constexpr, STORED: tl.constexpr, NEXT: tl.constexpr,
    W: tl.constexpr, G: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    WIDE: tl.constexpr = tl.float64 if W == tl.float64 else tl.float32
    lr = tl.load(line + _SGD_LR).to(WIDE)
    momentum = tl.load(line + _MOMENTUM).to(WIDE)
    undampened = (1 - tl.load(line + _DAMPENING)).to(WIDE)
    weight_decay = tl.load(line + _SGD_DECAY).to(WIDE)
    nesterov = tl.load(line + _NESTEROV) != 0
    maximize = tl.load(line + _SGD_MAXIMIZE) != 0
    if MIXES:
        of_g, of_s = tl.where(maximize, -of_g, of_g), tl.where(maximize, -of_s, of_s)
    else:
        scale = tl.where(maximize, -scale, scale)
    scale = scale.to(WIDE)
    limit = limit.to(WIDE)
    first_key, second_key, number = _draws(rounding, rows, chunks)
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        old = load(source, at, end, W, FULL).to(WIDE)
        d = load_gradient(g, at, end, kind, G, FULL).to(WIDE) * scale
        if MOMENTUM:
            last = load(buffer, at, end, W, FULL).to(WIDE)
        if MIXES:
            d, step, kept = _mix(d, s, at, end, of_g, of_s, direct_g, direct_s, keep_g, keep_s, STORED, M, FULL)
            if NEXT:
                store(s_next, at, end, kept, M, FULL, ".cs")
        d = tl.minimum(tl.maximum(d, -limit), limit)
        d = tl.where(weight_decay != 0, d + old * weight_decay, d)
        if MOMENTUM:
            new = tl.where(last == last, last * momentum + d * undampened, d)
            store(buffer, at, end, tl.where(momentum != 0, new, last), W, FULL, "")
            d = tl.where(momentum != 0, tl.where(nesterov, d + new * momentum, new), d)
        new_w = tl.where(lr != 0, old - d * lr, old)
        if MIXES:
            new_w -= step
        if rounding is not None:
            new_w = _rounded(new_w, number, at, first_key, second_key)
        store(w, at, end, new_w, W, FULL, "")


@triton.jit(do_not_specialize=["n_rows"])
def descend_adam(
    rows, chunks, n_rows, hyper, scaling, sums, backup, ema, ema_next, mixture, stored, stored_next,
    rounding, exp_avg, exp_avg_sq, steps, counter,
    W: tl.constexpr, G: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row is one parameter here. The program that finishes last counts the steps up, when all have read them."""
    n = tl.num_programs(0)
    w, g, offset, group, param, climbed, kind, count = find_chunk(rows, chunks, n - 1 - tl.program_id(0), W)
    source = tl.where(climbed, part(backup, offset), w)
    first = part(exp_avg, offset)
    second = part(exp_avg_sq, offset)
    s, s_next = part(stored, offset), part(stored_next, offset)
    if not all_finite(sums):
        abandon(w, source, ema, ema_next, offset, count, W, M)
    else:
        if g == 0:
            copy(w, source, 0, count, W, TAIL, False)
        else:
            line = hyper + _ADAM * group
            scale, limit = _scale_and_limit(scaling, sums)
            t = tl.load(steps + param).to(tl.float64) + 1
            of_g, of_s, direct_g, direct_s, keep_g, keep_s = _mixture(mixture, group, W)
            full = full_blocks(count, w | source | g | first | second | s | s_next, BLOCK)
            _adam_range(
                0, full, w, source, g, first, second, s, s_next, line, scale, limit, t, kind,
                of_g, of_s, direct_g, direct_s, keep_g, keep_s, rounding, rows, chunks,
                mixture is not None, stored is not None, stored_next is not None,
                W, G, M, BLOCK, True,
            )  # fmt: skip
            _adam_range(
                full, count, w, source, g, first, second, s, s_next, line, scale, limit, t, kind,
                of_g, of_s, direct_g, direct_s, keep_g, keep_s, rounding, rows, chunks,
                mixture is not None, stored is not None, stored_next is not None,
                W, G, M, TAIL, False,
            )  # fmt: skip
        if is_last(counter, n):
            for start in range(0, n_rows, 128):
                row = start + tl.arange(0, 128)
                gradient = tl.load(rows + _ROW * row + _GRADIENT, mask=row < n_rows, other=0)
                taken = (row < n_rows) & (gradient != 0)
                step = steps + tl.load(rows + _ROW * row + _PARAM, mask=taken, other=0)
                tl.store(step, tl.load(step, mask=taken) + 1, mask=taken)


@triton.jit
def _root(x):
    """sqrt(x), also where float32 has no normal number for x: a GPU's approximation takes that for 0."""
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        small = x < 2.0**-96
        return tl.sqrt(tl.where(small, x * 2.0**64, x)) * tl.where(small, 2.0**-32, 1.0)


@triton.jit
def _adam_range(
    begin, end, w, source, g, first, second, s, s_next, line, scale, limit, t, kind,
    of_g, of_s, direct_g, direct_s, keep_g, keep_s, rounding, rows, chunks,
    MIXES: tl.constexpr, STORED: tl.constexpr, NEXT: tl.constexpr,
    W: tl.constexpr, G: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    WIDE: tl.constexpr = tl.float64 if W == tl.float64 else tl.float32
    lr, decay = tl.load(line + _LR), tl.load(line + _DECAY)
    decoupled = tl.load(line + _DECOUPLED) != 0
    one_minus_beta1 = (1 - tl.load(line + _BETA1)).to(WIDE)
    beta2 = tl.load(line + _BETA2).to(WIDE)
    one_minus_beta2 = (1 - tl.load(line + _BETA2)).to(WIDE)
    step_size = (lr / (1 - tl.exp2(t * tl.load(line + _LOG2_BETA1)))).to(WIDE)
    correction2 = tl.sqrt(1 - tl.exp2(t * tl.load(line + _LOG2_BETA2))).to(WIDE)
    eps = tl.load(line + _EPS).to(WIDE)
    factor = tl.where(decoupled, 1 - lr * decay, 1.0).to(WIDE)
    weight_decay = tl.where(decoupled, 0.0, decay).to(WIDE)
    maximize = tl.load(line + _MAXIMIZE) != 0
    if MIXES:
        of_g, of_s = tl.where(maximize, -of_g, of_g), tl.where(maximize, -of_s, of_s)
    else:
        scale = tl.where(maximize, -scale, scale)
    scale = scale.to(WIDE)
    limit = limit.to(WIDE)
    first_key, second_key, number = _draws(rounding, rows, chunks)
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        old = load(source, at, end, W, FULL).to(WIDE)
        d = load_gradient(g, at, end, kind, G, FULL).to(WIDE) * scale
        if MIXES:
            d, step, kept = _mix(d, s, at, end, of_g, of_s, direct_g, direct_s, keep_g, keep_s, STORED, M, FULL)
            if NEXT:
                store(s_next, at, end, kept, M, FULL, ".cs")
        d = tl.minimum(tl.maximum(d, -limit), limit)
        d = tl.where(weight_decay != 0, d + old * weight_decay, d)
        a = load(first, at, end, W, FULL).to(WIDE)
        a = a + (d - a) * one_minus_beta1
        q = load(second, at, end, W, FULL).to(WIDE) * beta2 + d * d * one_minus_beta2
        store(first, at, end, a, W, FULL, "")
        store(second, at, end, q, W, FULL, "")
        denominator = _root(q) / correction2 + eps
        new_w = tl.where(step_size != 0, old * factor - a / denominator * step_size, old)
        if MIXES:
            new_w -= step
        if rounding is not None:
            new_w = _rounded(new_w, number, at, first_key, second_key)
        store(w, at, end, new_w, W, FULL, "")


@triton.jit
def _scale_and_limit(scaling, sums):
    """What every gradient is multiplied by, clipping to a global norm included, and the magnitude it is limited to."""
    clip = tl.minimum(1.0, tl.load(scaling + _MAX_NORM) / (tl.sqrt(tl.load(sums)) + 1e-6))
    return tl.load(scaling + _GRAD_SCALE) * clip, tl.load(scaling + _CLIP_VALUE)


@triton.jit
def _mixture(mixture, group, W: tl.constexpr):
    """A group's coefficients of g and s: for the rule, for w, for the next s. Loaded once for blocks and tail."""
    WIDE: tl.constexpr = tl.float64 if W == tl.float64 else tl.float32
    none = tl.zeros((), WIDE)
    if mixture is None:
        return none, none, none, none, none, none
    else:
        line = mixture + _MIXTURE * group
        of_g, of_s = tl.load(line + _OF_GRADIENT).to(WIDE), tl.load(line + _OF_STORED).to(WIDE)
        direct_g, direct_s = tl.load(line + _DIRECT_GRADIENT).to(WIDE), tl.load(line + _DIRECT_STORED).to(WIDE)
        keep_g, keep_s = tl.load(line + _KEEP_GRADIENT).to(WIDE), tl.load(line + _KEEP_STORED).to(WIDE)
        return of_g, of_s, direct_g, direct_s, keep_g, keep_s


@triton.jit
def _mix(
    g, s, at, end, of_g, of_s, direct_g, direct_s, keep_g, keep_s,
    STORED: tl.constexpr, M: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """What the rule gets in the place of g, what is subtracted from w directly, and the next s."""
    h, step, kept = g * of_g, g * direct_g, g * keep_g
    if STORED:
        vector = load(s, at, end, M, FULL).to(g.dtype)
        h, step, kept = h + vector * of_s, step + vector * direct_s, kept + vector * keep_s
    return h, step + 0.0, kept  # of no step -0.0 must not become 0.0: less 0.0 it stays what it is


@triton.jit
def _draws(rounding, rows, chunks):
    """The keys of stochastic rounding and the number of the chunk's first element; without it, nothing of use.

    Read for the blocks and again for the tail: kept from one to the other they would not stay in registers.
    """
    none = tl.zeros((), tl.uint32)
    if rounding is None:
        return none, none, none
    else:
        first_key, second_key = tl.load(rounding + _FIRST_KEY), tl.load(rounding + _SECOND_KEY)
        number = first_number(rows, chunks, in_reverse())
        return first_key.to(tl.int64).to(tl.uint32), second_key.to(tl.int64).to(tl.uint32), number.to(tl.uint32)


@triton.jit
def _rounded(x, number, at, first_key, second_key):
    """float32 rounded to bfloat16 up or down at random, by :func:`fastsam.kernels.torch.random_bits`."""
    bits = (number + at.to(tl.uint32)) ^ first_key
    bits = (bits ^ (bits >> 16)) * 0x7FEB352D
    bits = ((bits ^ (bits >> 15)) + second_key) * 0x846CA68B
    rounded = (x.to(tl.uint32, bitcast=True) + (bits >> 16)) & 0xFFFF0000
    return tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)


@triton.jit
def abandon(w, source, ema, ema_next, offset, count, W: tl.constexpr, M: tl.constexpr):
    """Leaves weights and average as they were before the step; the host swaps the averages all the same."""
    copy(w, source, 0, count, W, TAIL, False)
    if ema is not None:
        copy(part(ema_next, offset), part(ema, offset), 0, count, M, TAIL, False)
