"""The five passes on a device, up to the launch itself: what the host does is the same for every backend there.

Such a backend has a function ``launch(name, space, layout, tensors, **flags)``: ``name`` is that of one of the
passes; ``tensors`` are what its kernel reads and writes besides the tables of ``layout``, in the order of the kernel's
arguments, None where a method has no such buffer. Nothing here waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastsam.flat.space import FlatSpace
from fastsam.kernels import Ascent, Descent, Scalar
from fastsam.kernels.device import SGD, on_device, table_of


def gram(space: FlatSpace, ascent: Ascent) -> Tensor:
    table = table_of(space)
    layout = table.layout(space)
    sums = table.sums[ascent.met is not None]
    met = None if ascent.met is None else ascent.met.to(space.device)
    _mark_ascent(space, ascent)
    if not layout.programs:
        return sums.zero_() if met is None else torch.mul(met, 0, out=sums)
    groups = _ascent_groups(space, ascent) if _weighted(ascent) or ascent.ema is not None else None
    buffers = (ascent.ema, ascent.vector, table.partials, table.counter, sums, met)
    scaling = _ascent_scaling(space, ascent)
    space.kernels.launch("gram", space, layout, (groups, scaling, *buffers), weighted=_weighted(ascent))
    return sums


def climb(space: FlatSpace, ascent: Ascent, sums: Tensor) -> None:
    table = table_of(space)
    layout = table.layout(space)
    if closed_form(ascent):
        groups = _ascent_groups(space, ascent)
    else:
        groups = table.hyper("coefficients", ascent_lines(ascent, sums), repeated=True)
    buffers = (space.buffer("backup").flat, ascent.ema, ascent.ema_next, ascent.vector)
    if layout.programs:
        scaling = _ascent_scaling(space, ascent)
        tensors = (groups, scaling, sums, *buffers)
        space.kernels.launch("climb", space, layout, tensors, closed_form=closed_form(ascent))
    space.climbed = _with_gradient(space)
    if ascent.ema_next is not None:
        table.written(ascent.ema_next, space.climbed)


def descend_sgd(space: FlatSpace, descent: Descent, sums: Tensor) -> None:
    layout = table_of(space).layout(space)
    groups = _sgd_groups(space, descent, _with_gradient(space))
    if layout.programs:
        tensors = (groups, *_descent_tensors(space, descent, sums), descent.state.get("momentum_buffer"))
        space.kernels.launch("descend_sgd", space, layout, tensors)


def descend_adam(space: FlatSpace, descent: Descent, sums: Tensor) -> None:
    table = table_of(space)
    layout = table.layout(space, merged=False)  # neighbours may have taken different numbers of steps
    groups = _adam_groups(space, descent, _with_gradient(space))
    if layout.programs:
        state = (descent.state[name] for name in ("exp_avg", "exp_avg_sq", "step"))
        tensors = (groups, *_descent_tensors(space, descent, sums), *state, table.counter)
        space.kernels.launch("descend_adam", space, layout, tensors)
    else:  # parameters without elements, as a shard may be: their steps are counted all the same
        counted = table.upload(torch.tensor(_with_gradient(space), device="cpu"))
        descent.state["step"].add_(counted & sums.isfinite().all())


def restore(space: FlatSpace) -> None:
    if not any(space.climbed):
        return
    layout = table_of(space).layout(space, gradients=False)
    if layout.programs:
        space.kernels.launch("restore", space, layout, (space.buffer("backup").flat,))


def refresh(space: FlatSpace, ascent: Ascent | None, descend: str, descent: Descent, updated: Sequence[bool]) -> None:
    """What a replay of a step's launches needs of the host: hyper-parameters as they are now, and marks.

    ``descend`` is the name of the second pass's function, ``updated`` says which parameters have gradients in the
    step. In the order of the current stream, so before a replay there and after the one before it. What depends on
    sums, coefficients and mixtures, is in the replay itself.
    """
    table_of(space).numbers_as_captured()
    if ascent is not None:
        _mark_ascent(space, ascent)
        _ascent_groups(space, ascent)
        _ascent_scaling(space, ascent)
        if ascent.ema_next is not None:
            table_of(space).written(ascent.ema_next, updated)
    {"descend_sgd": _sgd_groups, "descend_adam": _adam_groups}[descend](space, descent, updated)
    _descent_scaling(space, descent)
    _rounding(space, descent)


def closed_form(ascent: Ascent) -> bool:
    """Whether the kernels may compute the coefficients themselves, by the closed form of the family:

    c_d = rho (1/n - alpha s <d,v>/n^2) and c_v = rho alpha s, with n = sqrt(<d,d>) + 1e-12, s = sign <d,v>.
    A method says so by ``coefficients.closed_form = True``; what overrides it does not inherit that.
    """
    return getattr(ascent.coefficients, "closed_form", False)


def scaling_line(grad_scale, max_norm: float | None = None, clip_value: float | None = None) -> list[tuple]:
    return [(grad_scale, math.inf if max_norm is None else max_norm, math.inf if clip_value is None else clip_value)]


def ascent_lines(ascent: Ascent, sums: Tensor | None) -> list[tuple]:
    """The groups' lines for the first pass; with ``sums``, a method's own coefficients computed on the device."""
    lines = []
    for g in ascent.groups:
        pair: tuple[Scalar, Scalar] = (
            g.get("rho", 0.0),
            g.get("alpha", 0.0),
        )  # without any v, <d,v> is 0 and so is its sign
        if sums is not None and not closed_form(ascent):
            assert ascent.coefficients is not None
            dd, dv, vv = sums.unbind()
            pair = ascent.coefficients(dd, dv, vv, g)
        lines.append((*pair, g.get("sigma", 0.0), g.get("lmbda", 0.0), g.get("adaptive", False)))
    return lines


def mixture_lines(descent: Descent, sums: Tensor) -> list[tuple]:
    """The groups' mixtures, computed on the device from the sums there."""
    assert descent.mixtures is not None
    return [tuple(descent.mixtures(sums.unbind(), g)) for g in descent.groups]


def sgd_lines(groups: Sequence[dict]) -> list[tuple]:
    return [tuple(g[name] for name in SGD) for g in groups]


def adam_lines(groups: Sequence[dict]) -> list[tuple]:
    return [
        (
            g["lr"],
            *g["betas"],
            *map(_log2, g["betas"]),
            g["eps"],
            g["weight_decay"],
            g["decoupled_weight_decay"],
            g["maximize"],
        )
        for g in groups
    ]


def _log2(beta) -> float | Tensor:
    """For beta^t as 2^(t log2 beta), which devices compute without a power function."""
    if on_device(beta):
        return beta.double().log2()
    return math.log2(beta) if beta > 0 else -math.inf


def _with_gradient(space: FlatSpace) -> list[bool]:
    return [g is not None for g in space.gradients]


def _weighted(ascent: Ascent) -> bool:
    return ascent.weighted and any(g["adaptive"] for g in ascent.groups)


def _mark_ascent(space: FlatSpace, ascent: Ascent) -> None:
    if ascent.ema is not None:
        table_of(space).blank(space, ascent.ema, ascent.ema_started, math.nan)


def _ascent_groups(space: FlatSpace, ascent: Ascent) -> Tensor:
    return table_of(space).hyper("ascent", ascent_lines(ascent, None))


def _ascent_scaling(space: FlatSpace, ascent: Ascent) -> Tensor:
    return table_of(space).hyper("ascent scaling", scaling_line(ascent.grad_scale))


def _sgd_groups(space: FlatSpace, descent: Descent, updated: Sequence[bool]) -> Tensor:
    table = table_of(space)
    momentum = descent.state.get("momentum_buffer")
    if momentum is not None:
        table.blank(space, momentum, descent.started, math.nan)
        with_momentum = [group["momentum"] != 0 for group in descent.groups]
        table.written(momentum, [u and with_momentum[g] for u, g in zip(updated, space.groups, strict=True)])
    return table.hyper("sgd", sgd_lines(descent.groups))


def _adam_groups(space: FlatSpace, descent: Descent, updated: Sequence[bool]) -> Tensor:
    table = table_of(space)
    for name in ("exp_avg", "exp_avg_sq"):
        table.blank(space, descent.state[name], descent.started, 0.0)
        table.written(descent.state[name], updated)
    return table.hyper("adam", adam_lines(descent.groups))


def _descent_scaling(space: FlatSpace, descent: Descent) -> Tensor:
    max_norm = descent.max_norm if descent.mixtures is None else None
    line = scaling_line(descent.grad_scale, max_norm, descent.clip_value)
    return table_of(space).hyper("descent scaling", line)


def _rounding(space: FlatSpace, descent: Descent) -> Tensor | None:
    return None if descent.rounding is None else table_of(space).hyper("rounding", [descent.rounding], of_step=True)


def _descent_tensors(space: FlatSpace, descent: Descent, sums: Tensor) -> tuple[Tensor | None, ...]:
    """What both descents take: scaling, sums, backup, m, the m that climb wrote, mixtures, s, where s goes on, keys."""
    backup = space.buffer("backup").flat if any(space.climbed) else None
    averages = (descent.ema, descent.ema_next)
    mixing: tuple[Tensor | None, ...] = (None, None, None)
    if descent.mixtures is not None:
        mixtures = table_of(space).hyper("mixture", mixture_lines(descent, sums), repeated=True)
        mixing = (mixtures, descent.stored, descent.stored_next)
    return _descent_scaling(space, descent), sums, backup, *averages, *mixing, _rounding(space, descent)
