"""What a method is: plain mathematics, without a tensor, a kernel or a process.

A step has two sides, and on each a linear combination of at most two flat vectors is all there is:

    climb      u = g - sigma m
               e = D (c_u u + c_v v),  D = w^2 if adaptive else 1      (c_u, c_v) = recipe.climb(<u,u>, <u,v>, <v,v>)
    descend    h = b_+ g_+ + b_s s                                     the base optimizer's update with h

g is the gradient at w and g_+ the one at w + e; m is a moving average of g, v an eigenvector of the Hessian, s a vector
that the step keeps. A method is a subclass of :class:`Recipe` and an optimizer class that names its arguments: see
``fastsam/methods/sam.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastsam.kernels import Mixture, Scalar

__all__ = ["NORM_EPSILON", "Group", "Mixture", "Recipe", "Scalar"]

#: Added to every norm before a division, as the authors of SAM do.
NORM_EPSILON = 1e-12

#: A group's hyper-parameters by the names that the method has for them.
Group = dict[str, Any]


class Recipe:
    """Base class of the recipes, which have no state: one object serves every optimizer of a method."""

    #: Whether u = g - sigma m, where m <- lmbda m + (1 - lmbda) g; the groups name ``sigma`` and ``lmbda``.
    averages = False
    #: Whether the perturbation may have a part along an eigenvector v of the Hessian.
    eigenvector = False
    #: Whether e is along the base optimizer's momentum instead of a gradient, so that a step makes one evaluation.
    along_momentum = False
    #: Whether s is the first gradient.
    keeps_gradient = False
    #: The name in the state of an s that is kept from step to step, or None.
    stored: str | None = None
    #: The hyper-parameters that the second side reads; None where it is g_+ alone.
    descends_by: tuple[str, ...] | None = None
    #: Whether an adaptive group's norm is of |w| u, as in ASAM, or of u.
    weighted_norm = True

    def check(self, group: Group) -> None:
        """Raises ``ValueError`` for a hyper-parameter of ``group`` outside its range."""

    def climb(self, uu: Scalar, uv: Scalar, vv: Scalar, group: Group) -> tuple[Scalar, Scalar]:
        """The coefficients (c_u, c_v) of the perturbation, from the sums <u,u>, <u,v> and <v,v>.

        The sums are floats, or 0-dimensional float64 tensors on a device: no branch may depend on them. They are over
        the parameters of all groups; without a vector v the last two are 0. A recipe whose coefficients are of the
        closed form that the kernels compute by themselves says so: ``climb.closed_form = True``
        (see :func:`fastsam.kernels.launches.closed_form`).
        """
        raise NotImplementedError

    def evaluations(self, steps: int, group: Group) -> int:
        """How many gradients a step takes after ``steps`` others: two, or one; ``group`` is the first."""
        return 1 if self.along_momentum else 2

    def numbers(self, group: Group) -> Group:
        """Hyper-parameters that follow from those of the method, such as ``sigma`` and ``lmbda`` of an average."""
        return {}

    def descend(self, first: Sequence[Scalar], second: Sequence[Scalar], group: Group) -> Mixture:
        """What the base optimizer steps with, and what is kept as s, after a climb.

        ``first`` are the sums that :meth:`climb` was given, ``second`` are <g_+,g_+>, <g_+,s> and <s,s>: floats, or
        tensors as there; both over the groups that are perturbed. Only where ``descends_by`` is not None.
        """
        raise NotImplementedError

    def between(self, second: Sequence[Scalar], group: Group) -> Mixture:
        """The same for a step of one evaluation between two that climb: g_+ is the gradient at w."""
        raise NotImplementedError
