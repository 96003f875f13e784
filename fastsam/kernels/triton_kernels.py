"""The device code of ``kernels/triton.py``: one program a chunk, everything of a pass in one launch.

``rows``, ``chunks``, ``hyper`` and ``scaling`` are the tables of :mod:`fastsam.kernels.device`, columns in its order.
``W``, ``G`` and ``M`` are the types of weights, gradients and a method's own vectors (m, v, s); ``G`` is None where a
launch meets several. Halves are computed in float32. Buffers that a method does not have are None; the backup and the
base optimizer's state have the type of the weights.
"""

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
    full_blocks,
    in_reverse,
    is_last,
    load,
    load_gradient,
    part,
    store,
)  # fmt: skip

_RHO, _ALPHA, _SIGMA, _LMBDA, _ADAPTIVE, _ASCENT = columns(device.ASCENT)
_GRAD_SCALE, _MAX_NORM, _CLIP_VALUE, _ = columns(device.SCALING)
_EPSILON = tl.constexpr(1e-12)  # added to every norm before a division


# ---- gram: <d,d>, <d,v>, <v,v> in one read -----------------------------------------------------------------


@triton.jit(do_not_specialize=["n_rows"])
def gram(
    rows, chunks, n_rows, hyper, scaling, ema, vector, partials, counter, sums, met,
    W: tl.constexpr, G: tl.constexpr, M: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Three partial sums of this chunk; the program that finishes last adds them all, in the order of chunks.

    ``met`` are sums that have to be finite for these to be: 0 times infinity is NaN.
    """
    i = tl.program_id(0)
    n = tl.num_programs(0)
    w, g, offset, group, _, _, kind, count = find_chunk(rows, chunks, i, W)
    count = tl.where(g != 0, count, 0)
    m = part(ema, offset)
    v = part(vector, offset)
    scale = tl.load(scaling + _GRAD_SCALE)
    sigma, adaptive = tl.zeros((), tl.float64), False
    if hyper is not None:
        line = hyper + _ASCENT * group
        sigma, adaptive = tl.load(line + _SIGMA), tl.load(line + _ADAPTIVE) != 0

    WIDE: tl.constexpr = tl.float64 if W == tl.float64 else tl.float32
    full = full_blocks(count, w | g | m | v, BLOCK)
    dd, dv, vv = _gram_range(
        0, full, w, g, m, v, scale, sigma, adaptive, kind,
        ema is not None, vector is not None, WEIGHTED, W, G, M, WIDE, BLOCK, True,
    )  # fmt: skip
    if full < count:
        tail_dd, tail_dv, tail_vv = _gram_range(
            full, count, w, g, m, v, scale, sigma, adaptive, kind,
            ema is not None, vector is not None, WEIGHTED, W, G, M, WIDE, TAIL, False,
        )  # fmt: skip
        dd += tail_dd
        dv += tail_dv
        vv += tail_vv
    if WIDE == tl.float32:  # few GPUs do more than one operation in float64 in the time of 64: for what overflows
        if (dd + dv + vv) * 0 != 0:
            dd, dv, vv = _gram_range(
                0, count, w, g, m, v, scale, sigma, adaptive, kind,
                ema is not None, vector is not None, WEIGHTED, W, G, M, tl.float64, TAIL, False,
            )  # fmt: skip

    SUMS: tl.constexpr = 1 if vector is None else 3  # the others are 0: the last program's work is behind all others'
    tl.store(partials + i, dd)
    if SUMS == 3:
        tl.store(partials + n + i, dv)
        tl.store(partials + 2 * n + i, vv)
    if is_last(counter, n):
        for k in tl.static_range(3):
            total = tl.zeros((), tl.float64)
            if k < SUMS:
                total = _total(partials + k * n, n)
            if met is not None:
                total += 0 * tl.load(met + k)
            tl.store(sums + k, total)


@triton.jit
def _gram_range(
    begin, end, w, g, m, v, scale, sigma, adaptive, kind,
    EMA: tl.constexpr, VECTOR: tl.constexpr, WEIGHTED: tl.constexpr,
    W: tl.constexpr, G: tl.constexpr, M: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    dd = tl.zeros((BLOCK,), WIDE)
    dv = tl.zeros((BLOCK,), WIDE)
    vv = tl.zeros((BLOCK,), WIDE)
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        d = load_gradient(g, at, end, kind, G, FULL).to(WIDE) * scale.to(WIDE)
        if EMA:
            average = load(m, at, end, M, FULL).to(WIDE)
            d = tl.where(average == average, d - average * sigma.to(WIDE), d)
        if VECTOR:
            e = load(v, at, end, M, FULL).to(WIDE)
            dv += d * e
            vv += e * e
        if WEIGHTED:
            d = tl.where(adaptive, d * load(w, at, end, W, FULL).to(WIDE), d)
        dd += d * d
    if VECTOR:
        return tl.sum(dd.to(tl.float64)), tl.sum(dv.to(tl.float64)), tl.sum(vv.to(tl.float64))
    else:
        return tl.sum(dd.to(tl.float64)), tl.zeros((), tl.float64), tl.zeros((), tl.float64)


@triton.jit
def _total(partials, n):
    """The sum of n float64 numbers, in an order that depends on n alone."""
    WIDTH: tl.constexpr = 2048
    lanes = tl.zeros((WIDTH,), tl.float64)
    for start in range(0, n, WIDTH):
        at = start + tl.arange(0, WIDTH)
        lanes += tl.load(partials + at, mask=at < n, other=0.0, cache_modifier=".cg")
    return tl.sum(lanes)


# ---- climb: back up w, write w + e, move the average on ------------------------------------------------------


@triton.jit(do_not_specialize=["n_rows"])
def climb(
    rows, chunks, n_rows, hyper, scaling, sums, backup, ema, ema_next, vector,
    W: tl.constexpr, G: tl.constexpr, M: tl.constexpr, CLOSED_FORM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    w, g, offset, group, _, _, kind, count = find_chunk(rows, chunks, in_reverse(), W)
    count = tl.where(g != 0, count, 0)
    b = part(backup, offset)
    m = part(ema, offset)
    m_next = part(ema_next, offset)
    v = part(vector, offset)
    if not all_finite(sums):
        copy(b, w, 0, count, W, TAIL, False)
    else:
        scale = tl.load(scaling + _GRAD_SCALE)
        line = hyper + _ASCENT * group
        c_d, c_v = tl.load(line + _RHO), tl.load(line + _ALPHA)
        if CLOSED_FORM:
            c_d, c_v = _coefficients(tl.load(sums), tl.load(sums + 1), c_d, c_v)
        sigma, lmbda, adaptive = tl.load(line + _SIGMA), tl.load(line + _LMBDA), tl.load(line + _ADAPTIVE) != 0
        full = full_blocks(count, w | g | b | m | m_next | v, BLOCK)
        _climb_range(
            0, full, w, g, b, m, m_next, v, scale, c_d, c_v, sigma, lmbda, adaptive, kind,
            ema is not None, ema_next is not None, vector is not None, W, G, M, BLOCK, True,
        )  # fmt: skip
        _climb_range(
            full, count, w, g, b, m, m_next, v, scale, c_d, c_v, sigma, lmbda, adaptive, kind,
            ema is not None, ema_next is not None, vector is not None, W, G, M, TAIL, False,
        )  # fmt: skip


@triton.jit
def _climb_range(
    begin, end, w, g, b, m, m_next, v, scale, c_d, c_v, sigma, lmbda, adaptive, kind,
    EMA: tl.constexpr, NEXT: tl.constexpr, VECTOR: tl.constexpr,
    W: tl.constexpr, G: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    WIDE: tl.constexpr = tl.float64 if W == tl.float64 else tl.float32
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        stored = load(w, at, end, W, FULL)
        gradient = load_gradient(g, at, end, kind, G, FULL).to(WIDE) * scale.to(WIDE)
        d = gradient
        if EMA:
            average = load(m, at, end, M, FULL).to(WIDE)
            met = average == average
            d = tl.where(met, gradient - average * sigma.to(WIDE), gradient)
            moved = average * lmbda.to(WIDE) + gradient * (1 - lmbda).to(WIDE)
            store(m_next, at, end, tl.where(met, moved, gradient), M, FULL, ".cs")
        elif NEXT:
            store(m_next, at, end, gradient, M, FULL, ".cs")
        e = d * c_d.to(WIDE)
        if VECTOR:
            e = e + load(v, at, end, M, FULL).to(WIDE) * c_v.to(WIDE)
        old = stored.to(WIDE)
        e = tl.where(adaptive, e * (old * old), e)
        store(b, at, end, stored, W, FULL, ".cs")
        store(w, at, end, old + e, W, FULL, "")


@triton.jit
def _coefficients(dd, dv, rho, alpha):
    """The closed form: c_d = rho (1/n - alpha s <d,v>/n^2), c_v = rho alpha s, n = ||d|| + 1e-12, s = sign <d,v>."""
    norm = tl.sqrt(dd) + _EPSILON
    c_v = rho * alpha * tl.where(dv > 0, 1.0, tl.where(dv < 0, -1.0, 0.0))
    return rho / norm - c_v * (dv / norm) / norm, c_v


@triton.jit(do_not_specialize=["n_rows"])
def restore(rows, chunks, n_rows, backup, W: tl.constexpr, BLOCK: tl.constexpr):
    w, _, offset, _, _, climbed, _, count = find_chunk(rows, chunks, in_reverse(), W)
    count = tl.where(climbed, count, 0)
    source = part(backup, offset)
    full = full_blocks(count, w | source, BLOCK)
    copy(w, source, 0, full, W, BLOCK, True)
    copy(w, source, full, count, W, TAIL, False)
