"""The specification: every kernel in plain torch, on any device, one parameter after another.

Weights, gradients and state of half precision are computed in float32 and rounded once, when they are stored: to the
nearest, but for a descent with stochastic rounding. float64 is computed in float64. Sums are formed in float64.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastsam.flat.space import FlatSpace
from fastsam.kernels import Ascent, Descent, Mixture, Scalar

#: The sums are looked at as soon as they are there.
DECIDES_ON_HOST = True


def unavailable() -> str | None:
    return None


def refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    return "sums are formed in float64, which MPS does not have: train on the CPU" if device.type == "mps" else None


def gram(space: FlatSpace, ascent: Ascent) -> Tensor:
    """<d,d>, <d,v> and <v,v> over every parameter with a gradient, as float64.

    d = g, or g - sigma m where m has met the parameter. With ``weighted``, adaptive groups count w d in <d,d>.
    """
    sums = torch.zeros(3, dtype=torch.float64, device=space.device)
    for i in _with_gradient(space):
        group = ascent.groups[space.groups[i]]
        d = direction(space, ascent, i).double()
        if ascent.vector is not None:
            v = _wide(_part(space, ascent.vector, i)).double()
            sums[1] += (d * v).sum()
            sums[2] += (v * v).sum()
        if ascent.weighted and group["adaptive"]:
            d = d * _weight(space, i).double()
        sums[0] += (d * d).sum()
    return carried(sums, ascent.met)


def climb(space: FlatSpace, ascent: Ascent, sums: Tensor) -> None:
    """backup <- w;  w <- w + D (c_d d + c_v v), D = w^2 if adaptive else 1;  m_next <- lmbda m + (1 - lmbda) g."""
    values = sums.tolist()  # the host waits once, not for every parameter
    finite = all_finite(values)
    assert ascent.coefficients is not None
    dd, dv, vv = values
    for i in _with_gradient(space):
        p, group = space.params[i], ascent.groups[space.groups[i]]
        _part(space, space.buffer("backup").flat, i).copy_(p)
        space.climbed[i] = True
        if not finite:
            continue
        w, g = _weight(space, i), _gradient(space, i) * ascent.grad_scale
        c_d, c_v = ascent.coefficients(dd, dv, vv, group)
        e = direction(space, ascent, i) * c_d
        if ascent.vector is not None:
            e = e + _wide(_part(space, ascent.vector, i)) * c_v
        if group["adaptive"]:
            e = e * (w * w)
        p.copy_(w + e)
        if ascent.ema_next is not None:
            m_next = g
            if ascent.ema is not None and ascent.ema_started[i]:
                m = _wide(_part(space, ascent.ema, i))
                m_next = m * group["lmbda"] + g * (1 - group["lmbda"])
            _part(space, ascent.ema_next, i).copy_(m_next)


def descend_sgd(space: FlatSpace, descent: Descent, sums: Tensor) -> None:
    """w <- backup, then ``torch.optim.SGD``'s update with momentum, dampening, nesterov, weight decay, maximize."""
    restore(space)
    values = sums.tolist()
    if not all_finite(values):
        return
    mixtures = mixtures_of(descent, values)
    for i in _with_gradient(space):
        group = descent.groups[space.groups[i]]
        w = _weight(space, i)
        g, direct = second_side_of(space, descent, i, mixtures, values[0])
        if group["maximize"]:
            g = -g
        if group["weight_decay"] != 0:
            g = g + w * group["weight_decay"]
        if group["momentum"] != 0:
            buffer = _part(space, descent.state["momentum_buffer"], i)
            new = g
            if descent.started[i]:
                new = _wide(buffer) * group["momentum"] + g * (1 - group["dampening"])
            buffer.copy_(new)
            g = g + new * group["momentum"] if group["nesterov"] else new
        _subtract(space, i, w, descent.rounding, g * float(group["lr"]) if group["lr"] != 0 else None, direct)


def descend_adam(space: FlatSpace, descent: Descent, sums: Tensor) -> None:
    """w <- backup, then ``torch.optim.Adam``'s update, or ``AdamW``'s where the decay is decoupled."""
    restore(space)
    values = sums.tolist()
    if not all_finite(values):
        return
    mixtures = mixtures_of(descent, values)
    for i in _with_gradient(space):
        group = descent.groups[space.groups[i]]
        lr, (beta1, beta2) = float(group["lr"]), map(float, group["betas"])
        w = _weight(space, i)
        g, direct = second_side_of(space, descent, i, mixtures, values[0])
        step = descent.state["step"][i]
        step += 1
        if group["maximize"]:
            g = -g
        if group["weight_decay"] != 0:
            if group["decoupled_weight_decay"]:
                w = w * (1 - lr * group["weight_decay"])
            else:
                g = g + w * group["weight_decay"]
        exp_avg, exp_avg_sq = (_part(space, descent.state[k], i) for k in ("exp_avg", "exp_avg_sq"))
        first = _wide(exp_avg) + (g - _wide(exp_avg)) * (1 - beta1)
        second = _wide(exp_avg_sq) * beta2 + g * g * (1 - beta2)
        exp_avg.copy_(first)
        exp_avg_sq.copy_(second)
        step_size = lr / (1 - beta1 ** float(step))
        denominator = second.sqrt() / (1 - beta2 ** float(step)) ** 0.5 + group["eps"]
        _subtract(space, i, w, descent.rounding, first / denominator * step_size if lr != 0 else None, direct)


def restore(space: FlatSpace) -> None:
    """w <- backup for every climbed parameter, bit for bit."""
    for i, climbed in enumerate(space.climbed):
        if climbed:
            space.params[i].copy_(_part(space, space.buffer("backup").flat, i))


def direction(space: FlatSpace, ascent: Ascent, i: int) -> Tensor:
    """d = g - sigma m, or g where there is no m yet."""
    g = _gradient(space, i) * ascent.grad_scale
    if ascent.ema is None or not ascent.ema_started[i]:
        return g
    return g - _wide(_part(space, ascent.ema, i)) * ascent.groups[space.groups[i]]["sigma"]


def mixtures_of(descent: Descent, sums: Sequence[float]) -> list[Mixture] | None:
    """Every group's mixture as numbers of the host; None where the base optimizer takes g itself."""
    if descent.mixtures is None:
        return None
    return [Mixture(*map(float, descent.mixtures(sums, group))) for group in descent.groups]


def clipped(g: Tensor, descent: Descent, squared_norm: float) -> Tensor:
    """``torch.nn.utils.clip_grad_norm_`` (``squared_norm`` is global) or ``clip_grad_value_``, or g as it is."""
    if descent.max_norm is not None and descent.mixtures is None:
        return g * clip_coefficient(descent.max_norm, squared_norm)
    return g if descent.clip_value is None else g.clamp(-descent.clip_value, descent.clip_value)


def clip_coefficient(max_norm: float, squared_norm: float) -> float:
    """min(1, max_norm / (norm + 1e-6)), as torch has it."""
    return min(1.0, max_norm / (squared_norm**0.5 + 1e-6))


def carried(sums: Tensor, met: Tensor | None) -> Tensor:
    """The sums, not finite where those of an earlier pass are not: 0 times infinity is NaN."""
    return sums if met is None else torch.add(sums, met.to(sums.device), alpha=0)


def all_finite(sums: Sequence[float]) -> bool:
    return all(map(math.isfinite, sums))


def second_side_of(
    space: FlatSpace, descent: Descent, i: int, mixtures: list[Mixture] | None, squared_norm: float
) -> tuple[Tensor, Tensor | None]:
    """h, clipped, and what is subtracted from the new weight directly; writes s_next."""
    g = _gradient(space, i) * descent.grad_scale
    if mixtures is None:
        return clipped(g, descent, squared_norm), None
    mixture = mixtures[space.groups[i]]
    s = None if descent.stored is None else _wide(_part(space, descent.stored, i))
    if descent.stored_next is not None:
        kept = _combination(g, s, mixture.keep_gradient, mixture.keep_stored)
        _part(space, descent.stored_next, i).copy_(kept)
    direct = None
    if mixture.direct_gradient != 0 or mixture.direct_stored != 0:
        direct = _combination(g, s, mixture.direct_gradient, mixture.direct_stored)
    return clipped(_combination(g, s, mixture.gradient, mixture.stored), descent, squared_norm), direct


def _combination(g: Tensor, s: Tensor | None, of_gradient: Scalar, of_stored: Scalar) -> Tensor:
    return g * of_gradient if s is None else g * of_gradient + s * of_stored


def random_bits(numbers: Tensor, keys: tuple[int, int]) -> Tensor:
    """Sixteen random bits, 0 to 65535, for each of the elements' ``numbers``: int64, of which 32 bits count.

    A hash of the number and two 32-bit keys: two multiplications, which every backend does alike.
    """
    first_key, second_key = keys
    x = (numbers ^ first_key) & 0xFFFFFFFF
    x = (x ^ (x >> 16)) * 0x7FEB352D & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) + second_key) * 0x846CA68B & 0xFFFFFFFF
    return x >> 16


def stochastically_rounded(x: Tensor, bits: Tensor) -> Tensor:
    """float32 rounded to values of bfloat16: to the one further from 0 with the probability that makes x the mean.

    ``bits`` are from :func:`random_bits`: added to the sixteen that bfloat16 cuts off, they carry over that often.
    A value of bfloat16, an infinity and a NaN stay what they are.
    """
    rounded = (x.view(torch.int32) + bits.to(torch.int32)) & -0x10000
    return torch.where(x.isnan(), x, rounded.view(torch.float32))


def _subtract(space: FlatSpace, i: int, w: Tensor, rounding: tuple[int, int] | None, *steps: Tensor | None) -> None:
    """Stores w less the steps there are, rounded once; without any, the weight stays what it is."""
    taken = [step for step in steps if step is not None]
    if not taken:
        return
    p, updated = space.params[i], functools.reduce(torch.sub, taken, w)
    if rounding is not None:
        begin = space.first[i]
        numbers = torch.arange(begin, begin + p.numel(), device=p.device).as_strided(p.shape, p.stride())
        updated = stochastically_rounded(updated, random_bits(numbers, rounding))
    p.copy_(updated)


def _with_gradient(space: FlatSpace) -> list[int]:
    return [i for i, g in enumerate(space.gradients) if g is not None]


def _part(space: FlatSpace, flat: Tensor, i: int) -> Tensor:
    """Parameter i's part of a flat buffer, shaped like the parameter."""
    p, offset = space.params[i], space.offsets[i]
    return flat[offset : offset + p.numel()].as_strided(p.shape, p.stride())


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _weight(space: FlatSpace, i: int) -> Tensor:
    return _wide(space.params[i].detach())


def _gradient(space: FlatSpace, i: int) -> Tensor:
    g = space.gradients[i]
    assert g is not None
    return _wide(g.detach())
