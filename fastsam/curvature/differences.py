r"""Hessian-vector products by differences of gradients: Hv = (g(w + r v) - g(w - r v)) / 2r for a unit vector v.

The radius r. Gradients carry a relative rounding error of about eps, the precision they are computed in. If the move
by r v changes them by tau ||g||, then rounding is a share eps / tau of the difference, and the central difference
neglects a share of about tau^2, since curvature and gradient change on the same length. Their sum is smallest at
tau ~ eps^(1/3): 0.5 % in float32, 20 % under bfloat16 autocast. The r that does so depends on the direction: a random
one has little curvature, the top eigenvector a hundred times more. So the first product begins at

    r = RADIUS eps^(1/2) ||w||

with eps of the weights' dtype or of autocast's, whichever is coarser, and is repeated if its tau was far off; every
product adapts r for the next one, by at most a factor SPREAD from that rule. A next direction of much more curvature
is then moved along too far: a product whose tau is above FAR is no derivative, and repeated. At a minimum, where ||g||
is no measure of anything, the bound decides.

Where gradients jump (ReLU, max pooling) the two ways answer different questions: double backward is blind to the
kinks, differences count each one that they cross.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fastsam import kernels
from fastsam.curvature.evaluations import Evaluations
from fastsam.curvature.vectors import Vectors
from fastsam.distributed.shards import local, shard_groups
from fastsam.flat.space import FlatSpace
from fastsam.kernels import Ascent
from fastsam.loop.frozen import Frozen
from fastsam.support.checks import describe
from fastsam.support.interrupts import uninterrupted

#: First move of a finite difference, as a share of ||w|| eps^(1/2).
RADIUS = 0.03
#: How far the gradients' change may take r from there.
SPREAD = 20.0
#: The change of the gradients, as a share, beyond which they are no longer linear in the move.
FAR = 0.4
#: How often a product is made again with another r.
REPEATS = 2


class Differences:
    """Finite differences at the present weights; ``radius`` overrides the rule."""

    def __init__(
        self,
        vectors: Vectors,
        evaluations: Evaluations,
        frozen: Frozen,
        radius: float | None,
        spaces: list[FlatSpace] | None,
    ) -> None:
        self._vectors, self._evaluations, self._frozen, self._fixed = vectors, evaluations, frozen, radius
        self._spaces = _spaces(vectors.trainable) if spaces is None else spaces
        self._weight_dtypes = {p.dtype for p in vectors.trainable}
        self._weight_norm: float | None = None
        self._factor, self._products = 1.0, 0

    def product(self, v: Tensor | dict[Tensor, Tensor]) -> Tensor:
        """Hv, a new vector (n,)."""
        length = self._vectors.norm(v)
        out = self._vectors.zeros()
        if length == 0:
            return out
        if not math.isfinite(length):
            raise FloatingPointError("the vector of a Hessian-vector product is not finite")
        repeats = 0
        while True:
            radius = self.radius()
            with self.moved(v, radius / length):
                above = self._evaluations.backward()
            if self.radius() > radius:  # the first pass ran under autocast, of which nothing was known before it
                continue
            self._add_gradients(out, 1.0)
            gradient, along = self._vectors.norm(out), self._vectors.dot(out, v)
            with self.moved(v, -radius / length):
                below = self._evaluations.backward()
            self._add_gradients(out, -1.0)
            change = self._vectors.norm(out) / 2
            if self._adapt(gradient, change) and repeats < REPEATS:
                repeats += 1
                out.zero_()
                continue
            # L(w + rv) - L(w - rv) = r <g+ + g-, v>, where g+ + g- = 2 g+ - (g+ - g-). If the slope along v is monotone
            # that is out by no more than r ||g+ - g-||. The losses are rounded, and so are the weights moved to.
            predicted = radius / length * (2 * along - self._vectors.dot(out, v))
            rounding = 2 * max(self._precision(), 5e-4) * (abs(above) + abs(below))
            rounding += 2 * gradient * min(radius, _coarsest(self._weight_dtypes) * self._norm_of_weights())
            self._evaluations.expect(above - below, predicted, rounding + 2 * radius * change)
            self._products += 1
            return out.mul_(length / (2 * radius))

    def radius(self) -> float:
        """Length of the move, in the units of the weights."""
        if self._fixed is not None:
            return self._fixed
        return RADIUS * self._precision() ** 0.5 * (self._norm_of_weights() or 1.0) * self._factor

    @contextlib.contextmanager
    def moved(self, v: Tensor | dict[Tensor, Tensor], scale: float) -> Iterator[None]:
        """The weights at w + scale v inside, and at w afterwards, bit for bit."""
        groups = 1 + max(max(space.groups) for space in self._spaces)
        ascent = Ascent([{"adaptive": False}] * groups, lambda *_: (scale, 0.0))
        try:
            with torch.no_grad(), uninterrupted():
                for space in self._spaces:
                    _follow(space)
                    # The kernels climb along the gradient; here v stands in its place.
                    space.use_gradients([self._direction(v, p, space) for p in space.owners])
                    space.climbed = [False] * len(space.params)
                    space.kernels.climb(space, ascent, space.kernels.gram(space, ascent))
            torch.clear_autocast_cache()  # casts of the weights at the point before
            yield
        finally:
            with torch.no_grad(), uninterrupted():
                for space in self._spaces:
                    _follow(space)
                    space.kernels.restore(space)
                    space.climbed = [False] * len(space.params)
                    space.use_gradients([None] * len(space.params))
            torch.clear_autocast_cache()

    def _direction(self, v: Tensor | dict[Tensor, Tensor], p: Tensor, space: FlatSpace) -> Tensor | None:
        if p not in self._vectors.offsets:
            return None
        part = self._vectors.part(v, p)
        if (part.dtype == torch.float64) != (space.dtype == torch.float64) or part.device != space.device:
            part = torch.empty_like(local(p)).copy_(part)
        return part

    def _add_gradients(self, out: Tensor, scale: float) -> None:
        self._evaluations.add_gradients(out, self._vectors.part, scale)

    def _adapt(self, gradient: float, change: float) -> bool:
        """Sets the radius for the next product; whether this one is worth repeating with it."""
        if self._fixed is not None or change == 0 or gradient == 0:
            return False
        tau = change / gradient if math.isfinite(change) and math.isfinite(gradient) else math.inf
        far = tau > FAR
        before, wish = self._factor, self._precision() ** (1 / 3)
        # From far away tau does not say how near is near enough.
        self._factor = 1.0 if far and before > 2 else min(max(before * wish / tau, 1 / SPREAD), SPREAD)
        return (far or self._products == 0) and not 1 / 2 < self._factor / before < 2

    def _norm_of_weights(self) -> float:
        if self._weight_norm is None:
            self._weight_norm = self._vectors.weight_norm()
            if not math.isfinite(self._weight_norm):
                raise FloatingPointError("the weights are not finite")
        return self._weight_norm

    def _precision(self) -> float:
        """eps of the coarsest dtype known to be in use: the weights' or autocast's."""
        autocast = self._frozen.autocast_dtype
        return _coarsest(self._weight_dtypes if autocast is None else self._weight_dtypes | {autocast})


def _coarsest(dtypes: set[torch.dtype]) -> float:
    return max(torch.finfo(dtype).eps for dtype in dtypes)


def _follow(space: FlatSpace) -> None:
    """FSDP2 moves its shards to their place when a model first runs."""
    if not space.still_fits():
        raise RuntimeError("a parameter changed its shape, strides, dtype or device while its curvature was measured")


def _spaces(params: list[Tensor]) -> list[FlatSpace]:
    split: dict[tuple, list[Tensor]] = {}
    for p in params:
        if not p.is_floating_point():
            raise TypeError(f"{describe(p)} has dtype {p.dtype}: only real floating-point parameters have a Hessian")
        split.setdefault((p.device, p.dtype, shard_groups(p)), []).append(p)
    spaces = [FlatSpace(members, [0] * len(members), True) for members in split.values()]
    for space in spaces:
        space.kernels = kernels.choose("auto", space.device, space.dtype)
    return spaces
